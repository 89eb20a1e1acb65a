"""Twenty steps of each method of training; alone, or as one of the processes torchrun starts. Writes the weights it ends with.

With one process, the batch is worked through in as many parts as argv says, their losses averaged: what that many processes do to it.
"""

import os
import sys

import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.task import ClassificationTask

import zoo_compress as zc
from zoo_compress.methods.binary import BinaryConfig
from zoo_compress.methods.gradual import GradualConfig
from zoo_compress.methods.netaug import NetAugTask
from zoo_compress.methods.slim import SlimTask
from zoo_compress.methods.us import UsTask

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
STEPS, BATCH, SIDE = 20, 8, 32
KINDS = ("slim", "us", "netaug", "gradual", "binary")


def make_task(kind, model):
    if kind == "netaug":
        net = zc.netaug(model, 2, 2)
        return net, NetAugTask(ClassificationTask(net, verbose=False), seed=1)
    if kind in ("gradual", "binary"):
        config = GradualConfig(density=0.3, every=3, regrow=0.2) if kind == "gradual" else BinaryConfig()
        net = config.wrap(model)
        return net, config.task(ClassificationTask(net, verbose=False), 1)
    net = zc.slim(model, (0.25, 0.5, 1.0), universal=kind == "us")
    inner = ClassificationTask(net, verbose=False)
    return net, UsTask(inner, seed=1) if kind == "us" else SlimTask(inner)


def train(kind, name, parts):
    torch.manual_seed(0)
    small = {"pretrained_cfg_overlay": {"input_size": (3, SIDE, SIDE)}, **({"img_size": SIDE} if "vit" in name else {})}
    net, task = make_task(kind, timm.create_model(name, num_classes=5, **small))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    if WORLD > 1:
        task.prepare_distributed()
    task.train()
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        if step % 10 == 0:
            task.start_epoch(step // 10, 2, optimizer, 10)
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).chunk(parts * WORLD)
        target = torch.randint(0, 5, (BATCH,), generator=generator).chunk(parts * WORLD)
        optimizer.zero_grad()
        draws = task.draws
        for part in range(parts):
            task.draws = draws
            (task(images[RANK + part], target[RANK + part])["loss"] / parts).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, parts, *names = sys.argv[1:]
    if WORLD > 1:
        dist.init_process_group("gloo")
    weights = {f"{name} {kind}": train(kind, name, int(parts)) for name in names for kind in KINDS}
    if RANK == 0:
        save_file(weights, out)
    if WORLD > 1:
        dist.destroy_process_group()

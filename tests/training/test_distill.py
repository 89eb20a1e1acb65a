"""Distillation by every task of timm's, from one teacher or several, with labels or without."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.methods.blocks import BlocksConfig
from zoo_compress.training.config import DistillConfig, FinetuneConfig
from zoo_compress.training.distill import Ensemble, create_task
from zoo_compress.training.loop import evaluate, fit

CPU = torch.device("cpu")


def test_an_ensembles_softmax_is_the_mean_of_its_teachers(make_model):
    teachers = [make_model(seed=1).eval(), make_model(seed=2).eval(), make_model(seed=3).eval()]
    x = torch.randn(4, 1, 16, 16)
    for temperature in (1.0, 3.0):
        together = Ensemble(teachers, make_model(), temperature, CPU)(x)
        mean = torch.stack([(teacher(x) / temperature).softmax(1) for teacher in teachers]).mean(0)
        torch.testing.assert_close((together / temperature).softmax(1), mean)


def test_learning_from_an_ensemble_is_learning_from_each(make_model):
    """The gradient of the divergence from the mean is the mean of the gradients of the divergences."""
    teachers, x, target = [make_model(seed=1), make_model(seed=2)], torch.randn(4, 1, 16, 16), torch.arange(4)
    config = FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig(temperature=2.0, task_loss_weight=0.0))

    def gradient(taught_by):
        student = make_model().eval()
        create_task(student, config, taught_by, CPU)(x, target)["loss"].backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    apart = torch.stack([gradient([teacher]) for teacher in teachers]).mean(0)
    torch.testing.assert_close(gradient(teachers), apart, rtol=1e-3, atol=1e-6)


def test_each_teacher_sees_images_normalised_its_own_way(make_model):
    student, teacher = make_model(), make_model(seed=1, mean=(0.1,), std=(2.0,)).eval()
    x = torch.randn(3, 1, 16, 16)
    cfg = student.pretrained_cfg
    pixels = x * cfg["std"][0] + cfg["mean"][0]
    found = Ensemble([teacher, teacher], student, 1.0, CPU)(x)
    torch.testing.assert_close(found.softmax(1), teacher((pixels - 0.1) / 2.0).softmax(1))


def test_labels_are_ignored_without_weight(make_model):
    config = FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig(task_loss_weight=0.0))
    task = create_task(make_model().eval(), config, [make_model(seed=1)], CPU)
    x = torch.randn(4, 1, 16, 16)
    assert torch.equal(task(x, torch.zeros(4, dtype=torch.long))["loss"], task(x, torch.full((4,), 7))["loss"])


def test_a_class_never_seen_is_learnt_from_the_teacher(digits):
    """Hinton et al. 2015, section 3: a student that never saw a 3 learns it from soft targets of other digits.

    As there, its bias for that class is far too low, and is raised to where most of all test images are right. A student that learnt from
    labels instead does not tell the class from others, whatever its bias.
    """
    missing = 3
    images, labels = _pixels(digits.train)
    tests, answers = _pixels(digits.test)
    kept = labels != missing
    config = {
        "labels": FinetuneConfig(epochs=1, lr=1e-3),
        "teacher": FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig(temperature=4.0, task_loss_weight=0.0)),
    }
    teacher = _trained(1, config["labels"], [], images, labels)
    found = {}
    for name in config:
        student = _trained(2, config[name], [teacher], images[kept], labels[kept])
        with torch.no_grad():
            found[name] = _raised(student(tests), answers, missing)
    assert found["teacher"] > 0.5, found
    assert found["labels"] < 0.3, found


def _raised(logits, answers, missing):
    """Share of a class's images that are right, with the bias at which most images are."""
    own = F.one_hot(torch.tensor(missing), 10)
    right = [(logits + bias * own).argmax(1) == answers for bias in torch.arange(0, 12, 0.25)]
    best = max(right, key=lambda each: int(each.sum()))
    return float(best[answers == missing].float().mean())


def _pixels(dataset):
    images = torch.from_numpy(dataset.images).float().unsqueeze(1)
    return F.interpolate((images / images.max() - 0.3) / 0.38, scale_factor=2), torch.as_tensor(dataset.labels).long()


def _trained(seed, config, teachers, images, labels):
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = timm.create_model(
        "vit_tiny_patch16_224", **sizes, num_classes=10, in_chans=1, pretrained_cfg_overlay={"mean": (0,), "std": (1,)}
    )
    task = create_task(model, config, teachers, CPU).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    steps = 15 * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(images) // 64) == 0:
            batches = torch.randperm(len(images)).split(64)
        chosen = batches[step % (len(images) // 64)]
        optimizer.zero_grad()
        task(images[chosen], labels[chosen])["loss"].backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def test_features_of_a_wider_teacher(make_model, make_loaders):
    """A projection meets the teacher's features; it trains and is gone afterwards."""
    train, test = make_loaders()
    teacher = timm.create_model("test_resnet", num_classes=10, in_chans=1, pretrained_cfg_overlay=make_model().pretrained_cfg)
    student = zc.prune(make_model(), keep=0.5)
    assert student.num_features < teacher.num_features
    config = FinetuneConfig(epochs=4, lr=3e-3, distill=DistillConfig(match="features", task_loss_weight=0.3))
    names = set(student.state_dict())
    history = fit(student, train, test, config, teacher=teacher)
    assert set(student.state_dict()) == names
    assert history[-1].train_loss < history[0].train_loss
    assert evaluate(student, test)["loss"] == history[-1].loss
    task = create_task(student, config, [teacher], CPU)
    trained = {id(p) for p in task.get_trainable_module().parameters()}
    assert {id(p) for p in task.get_trainable_module().projection.parameters()} <= trained


def test_a_distillation_token(make_model, make_loaders):
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10, "in_chans": 1}
    cfg = {**make_model().pretrained_cfg, "architecture": "deit_tiny_distilled_patch16_224"}
    student = timm.create_model("deit_tiny_distilled_patch16_224", **args, pretrained_cfg_overlay=cfg)
    before = copy.deepcopy(student.head_dist.weight)
    history = fit(
        student,
        *make_loaders(),
        FinetuneConfig(epochs=2, lr=3e-3, distill=DistillConfig(match="token", temperature=2.0)),
        teacher=make_model(seed=1),
    )
    assert history[-1].train_loss < history[0].train_loss
    assert not torch.equal(before, student.head_dist.weight)
    assert student.train()(torch.randn(2, 1, 16, 16)).shape == (2, 10), "logits again, not those of both tokens"


@pytest.mark.parametrize(
    ("settings", "teachers", "message"),
    [
        ({}, 0, "expected a teacher, found none"),
        ({"match": "token"}, 1, "expected a model with a distillation token, found ResNet"),
        ({"match": "features"}, 2, "expected one teacher"),
    ],
)
def test_what_does_not_fit_is_said_before_training(make_model, settings, teachers, message):
    config = FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig(**settings))
    with pytest.raises(CompressError, match=message):
        create_task(make_model(), config, [make_model(seed=1)] * teachers, CPU)


@pytest.mark.parametrize("match", ["features", "token"])
def test_methods_train_around_logits_only(make_model, make_loaders, match):
    """Said before anything is touched, not after the first epoch."""
    method, config = BlocksConfig(), FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig(match=match))
    cfg = {**make_model().pretrained_cfg, "architecture": "deit_tiny_distilled_patch16_224"}
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10, "in_chans": 1}
    net = method.wrap(timm.create_model("deit_tiny_distilled_patch16_224", **args, pretrained_cfg_overlay=cfg))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CompressError, match=rf"^distill\.match: expected logits beside a method of training, found {match}$"):
        fit(net, *make_loaders(), config, teacher=make_model(seed=1), method=method)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.train()(torch.randn(2, 1, 16, 16)).shape == (2, 10), "logits, not those of both tokens"


def test_a_teacher_of_other_classes_is_refused(make_model):
    config = FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig())
    teacher = make_model()
    teacher.reset_classifier(5)
    with pytest.raises(CompressError, match="num_classes 10 like the student, found 5"):
        create_task(make_model(), config, [teacher], CPU)


def test_a_teacher_of_other_channels_in_its_cfg_is_refused(make_model):
    """timm leaves three means to a model of one channel: what it would see has three."""
    teacher = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    config = FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig())
    with pytest.raises(CompressError, match=r"whose pretrained_cfg\.mean has as many channels as the student's, 1, found 3"):
        create_task(make_model(), config, [teacher], CPU)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("how", ["size", "precision"])
def test_a_teacher_that_cannot_look_at_the_images(make_model, how, count):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10, "in_chans": 1}
    cfg = {**make_model().pretrained_cfg, "architecture": "deit_tiny_patch16_224"}
    teacher = {
        "size": lambda: timm.create_model("deit_tiny_patch16_224", **args, pretrained_cfg_overlay=cfg),
        "precision": lambda: make_model().double(),
    }[how]()
    task = create_task(make_model(), FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig()), [teacher] * count, CPU)
    expected = r"^distill: expected a teacher that takes the student's images of \(1, 16, 16\) in float32, found (Vision|ResNet)"
    with pytest.raises(CompressError, match=expected):
        task(torch.randn(2, 1, 16, 16), torch.arange(2))


def test_a_student_that_is_not_timms(make_model):
    student = torch.nn.Sequential(make_model())
    student.num_classes, student.in_chans = 10, 1
    config = FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig())
    with pytest.raises(CompressError, match=r"expected a student of timm's, .* found Sequential"):
        create_task(student, config, [make_model()], CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"task_loss_weight": 1.5},
        {"teacher": []},
        {"teacher": [3]},
        {"match": "attention"},
        {"match": "features", "teacher": ["a", "b"]},
        {"match": "features", "task_loss_weight": 0.0},
        {"match": "features", "temperature": 2.0},
    ],
    ids=str,
)
def test_bad_settings(settings):
    with pytest.raises(CompressError):
        DistillConfig(**settings)


def test_kl_is_timms(make_model):
    """With one teacher nothing is between timm's task and it."""
    student, teacher, x = make_model().eval(), make_model(seed=1).eval(), torch.randn(4, 1, 16, 16)
    config = FinetuneConfig(epochs=1, lr=1e-3, distill=DistillConfig(temperature=3.0, task_loss_weight=0.25))
    target = torch.arange(4)
    loss = create_task(student, config, [teacher], CPU)(x, target)["loss"]
    divergence = F.kl_div((student(x) / 3).log_softmax(1), (teacher(x) / 3).softmax(1), reduction="batchmean") * 9
    torch.testing.assert_close(loss, 0.25 * F.cross_entropy(student(x), target) + 0.75 * divergence)

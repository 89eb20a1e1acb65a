"""Publishing, with the Hub's own client against a server of its protocol: what arrives, and what every failure says and leaves behind."""

import json
import logging
import shutil
import subprocess
import sys
import traceback

import pytest
import timm
import torch
from huggingface_hub import HfApi

import zoo_compress as zc
from zoo_compress.errors import CompressError, HubError

from ..hub_server import EXPIRED, OTHER_TOKEN, READ_TOKEN, TOKEN

REPO = "me/half"
FILES = {"config.json", "model.safetensors", "README.md"}


def pushed_files(hub, revision="main"):
    return {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}


class TestPublishing:
    def test_three_files_one_commit_and_back(self, hub, small):
        pushed = zc.push_to_hub(small, REPO, tag="v1")
        assert pushed.changed
        assert pushed.name == "hf-hub:me/half@v1"
        assert pushed_files(hub).keys() == FILES
        assert hub.repos[REPO].messages[1:] == ["Tag v1"]
        assert hub.repos[REPO].tags == {"v1": pushed.commit}
        again = timm.create_model(pushed.name, pretrained=True).eval()
        images = torch.randn(2, 3, 160, 160)
        assert torch.equal(again(images), small(images))

    def test_a_directory(self, hub, checkpoint, tmp_path):
        folder = shutil.copytree(checkpoint, tmp_path / "mine")
        (folder / "notes.txt").write_text("private")
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        zc.push_to_hub(folder, REPO)
        found = pushed_files(hub)
        assert found.keys() == FILES
        for name in ("config.json", "model.safetensors"):
            assert found[name] == (checkpoint / name).read_bytes()

    def test_own_readme_is_kept(self, hub, checkpoint, tmp_path):
        folder = shutil.copytree(checkpoint, tmp_path / "mine")
        (folder / "README.md").write_text('---\nlibrary_name: timm\n---\nload "local-dir:."\n')
        zc.push_to_hub(folder, REPO)
        assert pushed_files(hub)["README.md"].decode() == '---\nlibrary_name: timm\n---\nload "hf-hub:me/half"\n'

    def test_equal_content_makes_no_commit(self, hub, checkpoint):
        first = zc.push_to_hub(checkpoint, REPO)
        hub.log.clear()
        second = zc.push_to_hub(checkpoint, REPO, tag="v1")
        assert (second.changed, second.commit) == (False, first.commit)
        assert not {"commit", "batch", "upload"} & set(hub.steps())
        assert hub.repos[REPO].tags == {"v1": first.commit}
        assert not zc.push_to_hub(checkpoint, REPO, tag="v1").changed

    def test_the_model_and_its_directory_are_the_same(self, hub, small, checkpoint):
        zc.push_to_hub(checkpoint, REPO)
        assert not zc.push_to_hub(small, REPO).changed

    def test_a_revision_is_honoured(self, hub, small):
        zc.push_to_hub(small, REPO, tag="v1")
        torch.manual_seed(5)
        other = timm.create_model("test_resnet__pruned", keep=0.75).eval()
        zc.push_to_hub(other, REPO, tag="v2")
        images = torch.randn(1, 3, 160, 160)
        for revision, model in {"@v1": small, "@v2": other, "": other, f"@{hub.repos[REPO].tags['v1']}": small}.items():
            again = timm.create_model(f"hf-hub:{REPO}{revision}", pretrained=True).eval()
            assert torch.equal(again(images), model(images)), revision

    def test_a_branch(self, hub, small):
        zc.push_to_hub(timm.create_model("test_resnet", num_classes=3), REPO)
        repo = hub.repos[REPO]
        repo.branches["dev"] = repo.branches["main"]
        before = repo.branches["main"]
        zc.push_to_hub(small, REPO, revision="dev")
        assert repo.branches["main"] == before
        assert timm.create_model(f"hf-hub:{REPO}@dev", pretrained=True).num_classes == 1000

    def test_in_parts(self, hub, checkpoint):
        hub.part_size = 100_000
        zc.push_to_hub(checkpoint, REPO)
        assert pushed_files(hub)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        assert hub.steps().count("upload") > 2

    def test_private(self, hub, checkpoint):
        zc.push_to_hub(checkpoint, REPO, private=True)
        assert hub.repos[REPO].private
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)

    def test_channels_last_and_ties(self, hub):
        model = timm.create_model("test_resnet__pruned", keep=0.5).eval().to(memory_format=torch.channels_last)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        next(n for n in norms[1:] if n.weight.shape == norms[0].weight.shape).weight = norms[0].weight
        zc.push_to_hub(model, REPO)
        again = timm.create_model(f"hf-hub:{REPO}", pretrained=True)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize(
        "method",
        [
            lambda m: zc.slim(m, (0.5, 1.0)),
            lambda m: zc.add_exits(m, 2),
            lambda m: zc.slim(zc.add_exits(m, 1), (0.5, 1.0)),
            lambda m: zc.sparsify(zc.prune(m, keep=0.5), density=0.2),
            lambda m: zc.cluster(zc.sparsify(m, density=0.2), bits=4),
            lambda m: zc.prune(zc.factorize(m, macs=0.7), macs=0.8),
            zc.separate,
            lambda m: zc.remove_blocks(m, ["layer1.0"]),
        ],
        ids=["slim", "exits", "exits and widths", "sparse", "clustered", "low rank", "separable", "blocks"],
    )
    def test_every_kind_of_network(self, hub, method):
        torch.manual_seed(0)
        model = method(timm.create_model("test_resnet", num_classes=10)).eval()
        zc.push_to_hub(model, "me/it")
        again = timm.create_model("hf-hub:me/it", pretrained=True).eval()
        assert type(again).__name__ == type(model).__name__
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(again(x), model(x))
        assert {name: value.shape for name, value in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())

    def test_in_a_fresh_process(self, hub, small):
        """Nothing that this process knows is needed: name, record and weights come from the server."""
        zc.push_to_hub(small, REPO, tag="v1")
        program = f"""
import timm, torch, zoo_compress
model = timm.create_model("hf-hub:{REPO}@v1", pretrained=True).eval()
print(sum(p.numel() for p in model.parameters()))
"""
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
        assert int(out.stdout) == sum(p.numel() for p in small.parameters())


STEPS = ["info", "create", "refs", "validate", "preupload", "batch", "upload", "verify", "commit"]


class TestFaults:
    @pytest.fixture
    def old(self, hub):
        """A repository with another model in it."""
        zc.push_to_hub(timm.create_model("test_resnet", num_classes=3), REPO)
        return hub.repos[REPO].branches["main"]

    @pytest.mark.parametrize("step", [step for step in STEPS if step != "create"])
    def test_5xx_leaves_the_old_commit(self, hub, old, checkpoint, step):
        with hub.fault(step, status=503), pytest.raises(HubError, match="me/half: the Hub failed with status 503") as caught:
            zc.push_to_hub(checkpoint, REPO, tag="v1")
        assert "\n" not in str(caught.value)
        assert hub.repos[REPO].branches["main"] == old
        assert hub.repos[REPO].tags == {}
        assert step in hub.steps()
        assert zc.push_to_hub(checkpoint, REPO, tag="v1").changed

    @pytest.mark.parametrize("step", ["info", "validate", "commit"])
    def test_a_page_where_an_answer_should_be(self, hub, old, checkpoint, step):
        """Of a proxy in between, of a network that wants a login; or of the Hub's own front, with a status that the client does not see."""
        with hub.fault(step, body=lambda content: b"<html>Bad gateway</html>"), pytest.raises(HubError, match=r"me/half: .*HF_ENDPOINT"):
            zc.push_to_hub(checkpoint, REPO)

    def test_5xx_while_it_is_made(self, hub, checkpoint):
        with hub.fault("create", status=500), pytest.raises(HubError, match="status 500"):
            zc.push_to_hub(checkpoint, REPO)
        assert hub.repos == {}
        assert zc.push_to_hub(checkpoint, REPO).changed

    def test_5xx_on_the_last_step_is_said_and_made_good(self, hub, old, checkpoint):
        with (
            hub.fault("tag", status=500),
            pytest.raises(HubError, match=r"status 500.* committed as \w+, but the tag 'v1' was not set; push again"),
        ):
            zc.push_to_hub(checkpoint, REPO, tag="v1")
        pushed = zc.push_to_hub(checkpoint, REPO, tag="v1")
        assert not pushed.changed
        assert hub.repos[REPO].tags == {"v1": pushed.commit}

    def test_a_part_fails(self, hub, old, checkpoint):
        hub.part_size = 100_000
        for step in ("upload", "complete"):
            with hub.fault(step, status=503), pytest.raises(HubError, match="status 503"):
                zc.push_to_hub(checkpoint, REPO)
            assert hub.repos[REPO].branches["main"] == old

    def test_a_transient_failure_is_overcome(self, hub, checkpoint):
        with hub.fault("upload", status=503, times=2):
            assert zc.push_to_hub(checkpoint, REPO).changed

    def test_somebody_pushes_meanwhile(self, hub, old, checkpoint, monkeypatch):
        preupload = HfApi.preupload_lfs_files

        def slow(self, *args, **kwargs):
            preupload(self, *args, **kwargs)
            hub.repos[REPO].commit({"other": b""}, "meanwhile")

        monkeypatch.setattr(HfApi, "preupload_lfs_files", slow)
        with pytest.raises(HubError, match="somebody else pushed meanwhile"):
            zc.push_to_hub(checkpoint, REPO)
        assert hub.repos[REPO].messages[-1] == "meanwhile"

    @pytest.mark.parametrize(
        ("token", "said"),
        [
            (EXPIRED, "expired or wrong"),
            (READ_TOKEN, "this token only reads"),
            (OTHER_TOKEN, "the name belongs to somebody else; this token is of other"),
        ],
        ids=["expired", "read-only", "other"],
    )
    @pytest.mark.parametrize("exists", [True, False], ids=["exists", "new"])
    def test_tokens(self, hub, checkpoint, token, said, exists, caplog, capfd):
        caplog.set_level(logging.DEBUG)
        if exists:
            hub.put(REPO, {"README.md": b"mine"})
        before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
        with pytest.raises(HubError) as caught:
            zc.push_to_hub(checkpoint, REPO, token=token)
        assert said in str(caught.value)
        assert {name: repo.branches for name, repo in hub.repos.items()} == before
        said = str(caught.value) + repr(caught.value) + caplog.text + "".join(capfd.readouterr())
        assert token not in said
        assert TOKEN not in said

    def test_no_token(self, hub, checkpoint, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="no token"):
            zc.push_to_hub(checkpoint, REPO)

    @pytest.mark.parametrize("token", ["hf_secret\nhf_more", "", "hf secret", 3])
    def test_tokens_that_are_none_are_not_shown(self, hub, checkpoint, token):
        with pytest.raises(HubError, match="token: expected") as caught:
            zc.push_to_hub(checkpoint, REPO, token=token)
        assert "secret" not in str(caught.value)
        assert hub.log == []

    @pytest.mark.parametrize("given", [True, False], ids=["given", "stored"])
    def test_a_server_that_quotes_the_token(self, hub, checkpoint, given, monkeypatch):
        """Neither the message nor the traceback, with all its causes, shows it."""
        token = "some other kind"[:4] + "-of-token"
        hub.users[token] = ("me", "write")
        if not given:
            monkeypatch.setenv("HF_TOKEN", token)
        for step in ("info", "commit", "tag"):
            quoting = {"X-Error-Message": f"what is {token}?"}
            with hub.fault(step, status=418, headers=quoting), pytest.raises(HubError, match=r"status 418 \(.*what is …") as caught:
                zc.push_to_hub(checkpoint, REPO, tag="v1", token=token if given else None)
            assert token not in "".join(traceback.format_exception(caught.value))

    def test_a_name_taken_by_a_private_repository_of_somebody_else(self, hub, checkpoint):
        hub.put("other/secret", {"README.md": b"mine"}, private=True)
        with pytest.raises(HubError, match="the name is taken"):
            zc.push_to_hub(checkpoint, "other/secret")

    def test_private_is_not_pushed_into_a_public_one(self, hub, old, checkpoint):
        with pytest.raises(HubError, match="expected a private repository"):
            zc.push_to_hub(checkpoint, REPO, private=True)
        assert hub.repos[REPO].branches["main"] == old

    def test_a_tag_does_not_move(self, hub, small, checkpoint):
        zc.push_to_hub(timm.create_model("test_resnet", num_classes=3), REPO, tag="v1")
        head = hub.repos[REPO].branches["main"]
        with pytest.raises(HubError, match=f"'v1' already names commit {head[:12]}"):
            zc.push_to_hub(checkpoint, REPO, tag="v1")
        assert hub.repos[REPO].branches["main"] == head

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"repo_id": "half"}, "expected OWNER/NAME"),
            ({"repo_id": "me/a/b"}, "expected OWNER/NAME"),
            ({"repo_id": "me/.."}, "expected OWNER/NAME"),
            ({"tag": "a b"}, "tag: expected a name git admits"),
            ({"tag": "../main"}, "tag: expected a name git admits"),
            ({"revision": "-x"}, "revision: expected a name git admits"),
            ({"revision": "nowhere"}, "no revision"),
        ],
    )
    def test_bad_names(self, hub, checkpoint, arguments, said):
        hub.put(REPO, {"README.md": b"mine"})
        with pytest.raises(CompressError, match=said):
            zc.push_to_hub(checkpoint, **{"repo_id": REPO, **arguments})

    def test_only_a_pickle(self, hub, checkpoint, tmp_path):
        folder = shutil.copytree(checkpoint, tmp_path / "mine")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(CompressError, match=r"no safetensors .*pytorch_model\.bin"):
            zc.push_to_hub(folder, REPO)
        with pytest.raises(CompressError, match="expected a folder"):
            zc.push_to_hub(tmp_path / "nothing", REPO)
        assert hub.log == []

    def test_a_damaged_directory(self, hub, checkpoint, tmp_path):
        folder = shutil.copytree(checkpoint, tmp_path / "mine")
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(CompressError, match="sha256"):
            zc.push_to_hub(folder, REPO)
        assert hub.log == []

    def test_what_timm_cannot_make_again(self, hub):
        with pytest.raises(CompressError, match="save: expected a model made by timm"):
            zc.push_to_hub(torch.nn.Linear(2, 2), REPO)
        assert hub.log == []

    def test_offline(self, hub, checkpoint, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match=r"^me/half: HF_HUB_OFFLINE forbids to reach the Hub$"):
            zc.push_to_hub(checkpoint, REPO)

    def test_nobody_answers(self, hub, checkpoint):
        with hub.fault("info", silent=True), pytest.raises(HubError, match="the connection failed or broke off"):
            zc.push_to_hub(checkpoint, REPO)


def test_the_card_of_a_model_without_a_run_says_so(hub, small):
    zc.push_to_hub(small, REPO)
    card = pushed_files(hub)["README.md"].decode()
    assert 'create_model("hf-hub:me/half"' in card
    assert "without the record of a run" in card
    assert "Not measured" in card
    assert json.loads(pushed_files(hub)["config.json"])["architecture"] == "test_resnet__pruned"

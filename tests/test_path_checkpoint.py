"""A path's certificate beside the weights that it starts from: what comes back, what is refused, and that verify reads it."""

import dataclasses
import functools
import json

import pytest
import torch
from provable_nets import provable_net
from test_checkpoint import edit_metadata
from torch.nn import functional as F

import trainable_nn as tnn
from trainable_nn.certify.path_text import certificate_of
from trainable_nn.checkpoint import file
from trainable_nn.cli import main
from trainable_nn.errors import CertificateError, CheckpointError


def problem():
    g = torch.Generator().manual_seed(4)
    net = provable_net(5, 4, 2, 1, leak=0.0, strength=0.3)
    return net, *(torch.randn(2, n, generator=g, dtype=torch.float64) for n in (5, 2))


@functools.cache
def certificates():
    net, x, y = problem()
    return tnn.certify_path(net, x, y), tnn.certify(net, x, y)


def resaved(path, target, text):
    """The file with another certificate and a hash that fits it, as somebody who edits it can write one."""
    tensors, metadata = file.read(path)
    file.write(target, tensors, {k: v for k, v in metadata.items() if k not in ("hash", "format")} | {"certificate": text})
    return target


def test_a_checkpoint_gives_back_the_certificate_of_either_kind_and_it_verifies(tmp_path):
    net, x, y = problem()
    path, plain = certificates()
    assert path.grade == "ball" and path.steps > 0, path.explain()
    for certificate in (path, plain):
        tnn.save(net, tmp_path / "net", certificate=certificate)
        found = tnn.load(tmp_path / "net").certificate
        assert type(found) is type(certificate) and found == certificate
        other = provable_net(5, 4, 2, 1, leak=0.0, strength=0.3, seed=9)
        other[2].weight.data.copy_(net[2].weight)
        assert tnn.verify(found, tnn.load(tmp_path / "net", other), x, y) is None


def test_a_path_is_saved_with_the_weights_that_it_starts_from_and_no_others(tmp_path):
    (net, x, y), (path, _) = problem(), certificates()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=path.step_size)
    F.mse_loss(net(x), y).backward()
    optimizer.step()
    with pytest.raises(CheckpointError) as caught:
        tnn.save(net, tmp_path / "net", certificate=path)
    assert str(caught.value) == (
        f"{tmp_path / 'net'}: the certificate is of other weights, or of another mode or structure, than the model has now. "
        "Certify the model again, or save the one that was certified, with the weights before the first step."
    )
    assert not list(tmp_path.iterdir())


def test_a_path_that_proves_nothing_is_kept_as_what_it_is(tmp_path):
    net, x, y = problem()
    path = tnn.certify_path(net, x, y, steps=2)
    assert not path.holds
    tnn.save(net, tmp_path / "net", certificate=path)
    found = tnn.load(tmp_path / "net").certificate
    assert found == path and not found.holds and found.reason == path.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update({"trainable_nn path certificate": 7}),
        lambda d: d.pop("trainable_nn path certificate"),
        lambda d: d.pop("arrival"),
        lambda d: d.update(losses=[]),
        lambda d: d.update(losses=[1.0, "low"]),
        lambda d: d.update(tried=float("nan")),
        lambda d: d["arrival"].update(lambda_lower=float("nan")),
        lambda d: d["arrival"].update(grade="best"),
        lambda d: d["fingerprint"].pop("weights"),
        lambda d: d.update(holds=True),
    ],
)
def test_a_certificate_that_was_edited_into_nothing_is_refused_with_the_file_named(tmp_path, change):
    (net, _, _), (path, _) = problem(), certificates()
    tnn.save(net, tmp_path / "net", certificate=path)
    edited = json.loads(path.to_json())
    change(edited)
    with pytest.raises(CheckpointError, match=r"other: (Path)?Certificate\.from_json"):
        tnn.load(resaved(tmp_path / "net", tmp_path / "other", json.dumps(edited))).certificate  # noqa: B018


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_certificate_that_was_cut_is_refused(tmp_path, share):
    (net, _, _), (path, _) = problem(), certificates()
    text = path.to_json()
    text = text[: int(share * len(text))]
    tnn.save(net, tmp_path / "net", certificate=path)
    with pytest.raises(CheckpointError, match="the text is damaged"):
        tnn.load(resaved(tmp_path / "net", tmp_path / "other", text)).certificate  # noqa: B018
    with pytest.raises(CertificateError, match="the text is damaged"):
        certificate_of(text)


def test_an_edit_that_reads_well_is_found_by_the_hash_and_without_it_by_verify(tmp_path):
    (net, x, y), (path, _) = problem(), certificates()
    tnn.save(net, tmp_path / "net", certificate=path)
    better = dataclasses.replace(path, losses=(*path.losses[:3], path.losses[3] * 0.9, *path.losses[4:])).to_json()
    (tmp_path / "edited").write_bytes(edit_metadata((tmp_path / "net").read_bytes(), certificate=better))
    with pytest.raises(CheckpointError, match="do not fit its hash"):
        tnn.load(tmp_path / "edited")
    found = tnn.load(resaved(tmp_path / "net", tmp_path / "other", better)).certificate
    with pytest.raises(CertificateError, match=r"row 'losses\[3\]'"):
        tnn.verify(found, net, x, y)


def test_the_kind_is_read_from_the_entry_and_not_from_words_inside():
    _, plain = certificates()
    noted = dataclasses.replace(plain, notes=("a note on a trainable_nn path certificate",))
    assert certificate_of(noted.to_json()) == noted


NET = """
import torch
from torch import nn
import trainable_nn as tnn

def net():
    options = {"bias": False, "dtype": torch.float64}
    block = tnn.ContractiveResidual(nn.Sequential(tnn.WeightNormLinear(24, 24, **options), tnn.Tanh()), strength=0.2)
    first = tnn.EntryNormLinear(64, 24, leak=0.5, **options)
    return nn.Sequential(nn.Flatten(), first, block, tnn.OrthogonalReadout((24,), 10, dtype=torch.float64))
"""


def test_the_command_verify_reads_a_path_from_a_checkpoint(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    from trainable_nn.cli import models

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    few = ["net.py:net", "--images", "3"]
    assert main(["certify", *few, "--path", "2000", "-o", "p.json"]) == 0
    path = tnn.PathCertificate.from_json((tmp_path / "p.json").read_text())
    torch.manual_seed(0)
    net = models.build("net.py:net").eval()
    tnn.save(net, "net.safetensors", certificate=path)
    capsys.readouterr()
    assert main(["verify", "net.safetensors", *few, "--seed", "5"]) == 0  # weights from the file
    assert "holds: grade ball" in capsys.readouterr().out
    tnn.save(net, "low.safetensors", certificate=dataclasses.replace(path, distance=path.distance / 2))
    assert main(["verify", "low.safetensors", *few]) == 1
    assert "row 'distance'" in capsys.readouterr().out

"""verify, JSON and checkpoints: a certificate that was changed, or whose weights or data were, is refused by its row."""

import dataclasses
import json
import sys

import pytest
import torch
from provable_nets import provable_net

import trainable_nn as tnn
from trainable_nn.certify import Certificate
from trainable_nn.errors import CertificateError, CheckpointError
from trainable_nn.theory import Cost


def problem():
    g = torch.Generator().manual_seed(4)
    net = provable_net(5, 4, 2, 1, spread=0.2, strength=0.3)
    return net, *(torch.randn(2, n, generator=g, dtype=torch.float64) for n in (5, 2))


@pytest.fixture(scope="module")
def certified():
    net, x, y = problem()
    return tnn.certify(net, x, y)


def refused(certificate, *arguments, **options):
    with pytest.raises(CertificateError) as caught:
        tnn.verify(certificate, *(arguments or problem()), **options)
    return str(caught.value)


def test_a_certificate_survives_text_and_verifies(certified):
    again = Certificate.from_json(certified.to_json())
    assert again == certified and again.explain() == certified.explain()
    assert json.loads(certified.to_json(), parse_constant=lambda name: pytest.fail(name))["derived"]["radius"] > 0
    assert tnn.verify(again, *problem()) is None


NUMBERS = ["lambda_lower", "initial_loss", "infimum", "jacobian_upper"]
COUNTS = ["samples", "outputs", "parameters"]
DESCENT = [f.name for f in dataclasses.fields(tnn.theory.pl.Descent)]


@pytest.mark.parametrize("name", NUMBERS + COUNTS)
def test_an_edited_number_is_named(certified, name):
    value = getattr(certified, name)
    edited = dataclasses.replace(certified, **{name: value + 1 if name in COUNTS else value * 1.01 + 0.01})
    assert f"row '{name}'" in refused(edited)


@pytest.mark.parametrize("name", DESCENT)
def test_an_edited_number_of_the_descent_is_named(certified, name):
    value = getattr(certified.descent, name)
    new = (not value) if isinstance(value, bool) else value * 1.01 + 0.01
    edited = dataclasses.replace(certified, descent=dataclasses.replace(certified.descent, **{name: new}))
    assert f"row '{name}'" in refused(edited)


def test_every_row_counts(certified, monkeypatch):
    """One fresh certificate is enough for all: only what is compared with it changes."""
    monkeypatch.setattr(sys.modules["trainable_nn.certify.verify"], "certify", lambda *a, **k: certified)
    rows = certified.hypotheses
    for k, row in enumerate(rows):
        gone = dataclasses.replace(certified, hypotheses=rows[:k] + rows[k + 1 :])
        assert "missing" in refused(gone) and repr(row.name) in refused(gone)
        changes = {"holds": not row.holds, "value": 1.5 if row.value is None else row.value + 0.1}
        changes |= {"bound": 7.0 if row.bound is None else row.bound + 0.1, "grade": "none"}
        changes["kind"] = "measured" if row.kind == "proved" else "proved"
        for field, value in changes.items():
            edited = dataclasses.replace(row, **{field: value})
            said = refused(dataclasses.replace(certified, hypotheses=(*rows[:k], edited, *rows[k + 1 :])))
            assert repr(row.name) in said and field in said
    more = dataclasses.replace(certified, hypotheses=(*rows, dataclasses.replace(rows[0], name="the moon is full")))
    assert "'the moon is full'" in refused(more)
    twice = dataclasses.replace(certified, hypotheses=(*rows, rows[0]))
    assert "rows were found" in refused(twice)


def test_a_better_grade_is_refused(certified):
    net, x, _ = problem()
    low = tnn.certify(net, x)
    assert low.grade == "measured"
    assert "row 'grade'" in refused(dataclasses.replace(low, grade="global"), net, x, None)
    assert "row 'descent'" in refused(dataclasses.replace(certified, descent=None))


def test_other_weights_data_modes_and_constants_are_stale(certified):
    net, x, y = problem()
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-12
    assert "the weights are not those" in refused(certified, net, x, y)
    for change in (
        lambda n: setattr(n[0], "eps", 2.0),
        lambda n: setattr(n[0], "leak", 0.75),
        lambda n: n.eval(),
        lambda n: n[1].branch[0].weight.requires_grad_(False),
        lambda n: n.float(),
    ):
        net, x, y = problem()
        change(net)
        assert "the weights are not those" in refused(certified, net, x, y)
    net, x, y = problem()
    assert "the inputs are not those" in refused(certified, net, x + 1e-12, y)
    assert "the targets are not those" in refused(certified, net, x, y + 1e-12)
    assert "the targets are not those" in refused(certified, net, x)


def test_a_users_cost_must_be_given_again():
    half = Cost("half", lambda z, t: (z - t).square().sum() / 2, smoothness=1.0, pl=2.0)
    certificate = tnn.certify(*problem(), loss=half)
    assert "no file holds" in refused(certificate)
    assert "'mine' was given" in refused(certificate, loss=dataclasses.replace(half, name="mine"))
    tnn.verify(certificate, *problem(), loss=half)
    flatter = dataclasses.replace(half, smoothness=1.5)
    assert "row" in refused(certificate, loss=flatter)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("trainable_nn certificate"), "has no entry"),
        (lambda d: d.update({"trainable_nn certificate": 2}), "version 2"),
        (lambda d: d.update(grade="best"), "'best' is none of"),
        (lambda d: d.pop("loss"), "needs the fields"),
        (lambda d: d.update(extra=1), "needs the fields"),
        (lambda d: d["hypotheses"][0].pop("kind"), "a Hypothesis needs"),
        (lambda d: d["hypotheses"][0].update(holds="yes"), "Hypothesis.holds is 'yes'"),
        (lambda d: d["descent"].update(radius=None), "Descent.radius is None"),
        (lambda d: d["derived"].update(radius=0.5), "radius is 0.5"),
        (lambda d: d.update(hypotheses=3), "damaged"),
    ],
)
def test_text_that_is_no_certificate_is_refused(certified, change, words):
    found = json.loads(certified.to_json())
    change(found)
    with pytest.raises(CertificateError, match=words):
        Certificate.from_json(json.dumps(found))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{" * 5000])
def test_text_that_is_nothing_is_refused(text):
    with pytest.raises(CertificateError, match="from_json"):
        Certificate.from_json(text)


# in a checkpoint


def test_a_checkpoint_gives_the_certificate_back(certified, tmp_path):
    net, x, y = problem()
    tnn.save(net, tmp_path / "net.safetensors", certificate=certified)
    saved = tnn.load(tmp_path / "net.safetensors")
    assert saved.certificate == certified
    other = provable_net(5, 4, 2, 1, strength=0.3, seed=9)
    with torch.no_grad():
        other[2].weight.copy_(net[2].weight)
    tnn.verify(saved.certificate, tnn.load(tmp_path / "net.safetensors", other), x, y)
    tnn.save(net, tmp_path / "plain.safetensors")
    assert tnn.load(tmp_path / "plain.safetensors").certificate is None


def test_a_certificate_of_other_weights_is_not_saved(certified, tmp_path):
    net = provable_net(5, 4, 2, 1, strength=0.3, seed=9)
    with pytest.raises(CheckpointError, match="of other weights"):
        tnn.save(net, tmp_path / "net.safetensors", certificate=certified)
    assert not list(tmp_path.iterdir())

"""The command line: what it prints, what it writes, its exit status, and one clear line for every mistake."""

import builtins
import json
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from real_models import _import as import_real
from real_models import needs_real_models

import trainable_nn as tnn
from trainable_nn import spectra
from trainable_nn.cli import main
from trainable_nn.demo import optimizers, training
from trainable_nn.demo.resnet import PreActResNet18
from trainable_nn.errors import OptionError

pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")

NET = "trainable_nn.demo.resnet:PreActResNet18"
TINY = ["--epochs", "1", "--width", "2", "--size", "8", "--train-images", "128", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # test runners narrow it, and a table then breaks words


@pytest.fixture
def run(capsys):
    """Run one command line; its status, stdout and stderr."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def fails(run, *arguments, status=2):
    """The one line on stderr of a command that must fail without a traceback."""
    found, out, err = run(*arguments)
    assert found == status and out == ""
    assert err.startswith("trainable-nn: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def strict(text):
    """JSON without NaN and Infinity, which json.loads would let pass."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


# demo


def test_demo_trains_both_networks_and_writes_figure_and_numbers(run, tmp_path):
    status, out, err = run("demo", *TINY, "--output", "here")
    assert status == 0
    for words in ("3 of 8 places change", "layer2.0.shortcut", "Singular values", "original loss", "converted test"):
        assert words in out
    assert "epoch 1/1: training loss" in err  # no terminal, so lines
    assert (tmp_path / "here" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    results = strict((tmp_path / "here" / "results.json").read_text())
    assert results["settings"]["width"] == 2 and results["conversion"]["recipe"]["skip"] == "paper"
    assert [len(run["step_losses"]) for run in results["runs"].values()] == [4, 4]


def test_demo_prints_json_alone_and_is_repeatable(run):
    results = []
    for _ in range(2):
        status, out, _ = run("demo", *TINY, "--json", "--no-spectra", "--seed", "3")
        results.append(strict(out))
        assert status == 0
    losses = [{name: run["step_losses"] for name, run in result["runs"].items()} for result in results]
    assert losses[0] == losses[1]
    _, out, _ = run("demo", *TINY, "--json", "--no-spectra", "--seed", "4")
    assert strict(out)["runs"]["original"]["step_losses"] != losses[0]["original"]


def test_demo_reports_a_divergence_as_such(run):
    status, out, _ = run("demo", *TINY, "--no-spectra", "--lr", "1e12", "--epochs", "3")
    assert status == 1
    assert re.search(r"original: diverged: the loss of step \d+ is not finite", out)
    status, out, _ = run("demo", *TINY, "--no-spectra", "--lr", "1e12", "--json")
    assert status == 1 and strict(out)["runs"]["converted"]["diverged_at"] >= 2


def test_without_conversion_of_the_skip_both_curves_are_one(run):
    _, out, _ = run("demo", *TINY, "--json", "--no-spectra", "--skip", "conv")
    runs = strict(out)["runs"]
    assert runs["original"]["step_losses"] == runs["converted"]["step_losses"]


def test_the_orthogonal_skip_has_all_singular_values_one_in_the_demo(run):
    _, out, _ = run("demo", *TINY, "--json", "--skip", "orthogonal")
    shortcuts = [row for row in strict(out)["spectra"]["converted"] if row["path"].endswith("shortcut")]
    assert len(shortcuts) == 3
    for row in shortcuts:
        assert abs(row["smallest"] - 1) < 1e-12 and abs(row["largest"] - 1) < 1e-12


def test_demo_reads_images_from_a_folder(run, tmp_path):
    from test_datasets import write_cifar

    write_cifar(tmp_path, count=8)
    status, out, _ = run("demo", *TINY, "--no-spectra", "--data", "cifar10", "--folder", tmp_path, "--json")
    assert status == 0 and "cifar10: 40 train" in strict(out)["data"]


DEMO_MISTAKES = {
    "optimizer": (["--optimizer", "Nosuch"], "no such optimiser; there are .*SGD"),
    "library": (["--optimizer", "os.path"], "must be one of torch.optim, torch_optimizer"),
    "optimizer-arg": (["--optimizer-arg", "momentun=0.9"], "with a key of lr, momentum"),
    "bad value": (["--optimizer-arg", "momentum=-3"], "Invalid momentum"),
    "skip": (["--skip", "soup"], "skip must be one of"),
    "recipe": (["--recipe", "soup"], "no recipe is named 'soup'"),
    "device": (["--device", "nosuch"], "--device nosuch: torch cannot use it"),
    "data": (["--data", "nosuch"], "must be one of digits, idx"),
    "folder": (["--data", "idx"], "needs --folder"),
    "empty folder": (["--data", "idx", "--folder", "."], "train-images-idx3-ubyte is missing"),
    "size": (["--size", "12"], "must be a multiple of 8"),
    "output": (["--output", "file/inside"], "cannot be made"),
    "epochs": (["--epochs", "0"], "epochs"),
    "text": (["--epochs", "many"], "epochs"),
    "unknown": (["--nosuch"], "No such option"),
}


@pytest.mark.parametrize("options, words", DEMO_MISTAKES.values(), ids=DEMO_MISTAKES)
def test_a_mistake_in_demo_is_one_clear_line(run, options, words):
    pathlib.Path("file").touch()
    assert re.search(words, fails(run, "demo", *TINY, *options))


def test_a_missing_extra_is_named_before_anything_is_trained(run, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'trainable_nn[plot]'" in fails(run, "demo", *TINY)


def test_the_traceback_is_shown_on_request():
    with pytest.raises(OptionError):
        main(["demo", *TINY, "--data", "nosuch", "--traceback"])


# Optimisers


def loss_of_a_tiny_net():
    torch.manual_seed(0)
    model = PreActResNet18(2, 1)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    return model, lambda: torch.nn.functional.cross_entropy(model(x), y)


REFUSED = {  # what each says of a convolutional network
    "torch.optim.Muon": "only supports 2D parameters",
    "torch.optim.SparseAdam": "does not support dense gradients",
    "torch_optimizer.Adafactor": "broadcast|size|shape",  # its factored update is wrong for more than two axes
}


def names_of(library):
    module = pytest.importorskip(library)
    kinds = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    return sorted(key for key, value in kinds.items() if issubclass(value, torch.optim.Optimizer) and key != "Optimizer")


@pytest.mark.parametrize("library", ["torch.optim", "torch_optimizer"])
@pytest.mark.filterwarnings("error")
def test_every_optimizer_steps_or_says_why_not(library):
    steps, refusals = 0, {}
    for name in names_of(library):
        model, loss = loss_of_a_tiny_net()
        choice = optimizers.choose(f"{library}.{name}")
        try:
            optimizer = choice.build(model.parameters())
            losses = [choice.step(optimizer, loss) for _ in range(3)]
            assert all(map(math.isfinite, losses)) and losses[-1] != losses[0]
            steps += 1
        except OptionError as error:
            refusals[f"{library}.{name}"] = str(error)
    assert steps >= 13
    assert refusals.keys() <= REFUSED.keys()
    for name, text in refusals.items():
        assert re.search(REFUSED[name], text) and text.startswith(name)


def test_torch_comes_first_where_both_libraries_have_a_name():
    pytest.importorskip("torch_optimizer")
    assert optimizers.choose("RAdam").name == "torch.optim.RAdam"
    assert optimizers.choose("torch_optimizer.RAdam").name == "torch_optimizer.RAdam"
    assert optimizers.choose("Yogi").name == "torch_optimizer.Yogi"


def test_step_sizes_and_options_reach_the_optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(2))]

    def build(*arguments):
        return optimizers.choose(*arguments).build(parameters)

    assert optimizers.learning_rate(build("SGD")) == 0.1
    assert optimizers.learning_rate(build("SGD", 0.5, ["momentum=0.9"])) == 0.5
    assert build("SGD", None, ["momentum=0.9", "nesterov=True"]).defaults["nesterov"] is True
    assert optimizers.learning_rate(build("Adam")) == 0.001
    with pytest.raises(OptionError, match="key=value"):
        build("SGD", None, ["momentum"])


def test_an_optimizer_without_a_step_size_refuses_one():
    pytest.importorskip("torch_optimizer")
    with pytest.raises(OptionError, match="has no learning rate"):
        optimizers.choose("A2GradUni", 0.1)
    assert optimizers.choose("torch_optimizer.Lookahead", 0.3).inner_lr == 0.3


def test_a_missing_torch_optimizer_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_optimizer", None)
    with pytest.raises(OptionError, match=r"pip install 'trainable_nn\[optim\]'"):
        optimizers.choose("Yogi")
    assert optimizers.choose("SGD").name == "torch.optim.SGD"


# Spectra and accuracy, against what is known


def test_spectra_are_those_of_the_layers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Conv2d(2, 3, 1, bias=False))
    (found,) = spectra.spectra_of(model, ["1"], torch.randn(4, 2, 3, 3))
    expected = torch.linalg.svdvals(model[1].weight.detach().double().reshape(3, 2)).repeat_interleave(9)
    assert found.shape == (27, 18)
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=0)
    assert found.smallest == pytest.approx(float(expected[-1])) and found.largest == pytest.approx(float(expected[0]))
    assert model[0].running_mean.abs().max() == 0 and model.training  # the model itself is as it was


def test_a_jacobian_that_is_too_large_is_left_out(monkeypatch):
    monkeypatch.setattr(spectra, "LARGEST_JACOBIAN", 10)
    (found,) = spectra.spectra_of(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"], torch.randn(2, 4))
    assert found.values is None and found.smallest is None and found.shape == (4, 4)


def test_accuracy_counts_right_answers_and_keeps_the_mode():
    model = torch.nn.Identity().train()
    outputs = torch.eye(4)[[0, 1, 2, 2]]
    assert training.accuracy_on(model, outputs, torch.arange(4)) == 0.75
    assert model.training
    assert math.isnan(training.accuracy_on(model, outputs / 0, torch.arange(4)))


# plan and convert


def test_plan_prints_each_place_and_why(run):
    status, out, _ = run("plan", NET, "--model-arg", "width=2")
    assert status == 0 and "3 of 8 places change" in out and "layer4.1" in out and "PooledConv2d" in out


def test_plan_as_json_is_the_plan(run):
    status, out, _ = run("plan", NET, "--model-arg", "width=2", "--json", "--skip", "orthogonal", "--keep", "layer2.0")
    plan = strict(out)
    assert status == 0 and plan["recipe"]["skip"] == "orthogonal" and plan["keep"] == ["layer2.0"]
    assert tnn.Plan.from_dict(plan).recipe.skip == "orthogonal"


def test_convert_writes_what_load_reads(run, tmp_path):
    torch.manual_seed(0)
    model = PreActResNet18(2, 1)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, "ddp.pt")
    safetensors.torch.save_file(model.state_dict(), "plain.safetensors")
    tnn.save(model, "ours.safetensors")
    shape = ("--model-arg", "width=2", "--model-arg", "in_channels=1", "--sample-shape", "2,1,8,8")
    for source in ("ddp.pt", "plain.safetensors", "ours.safetensors"):
        status, out, _ = run("convert", NET, *shape, "--checkpoint", source, "-o", "out.safetensors")
        assert status == 0 and "Wrote out.safetensors" in out and "the outputs move by" in out
        saved = tnn.load("out.safetensors")
        assert saved.origin["factory"] == NET
        converted = tnn.load("out.safetensors", PreActResNet18(2, 1)).eval()
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(converted(x), tnn.convert_model(model, "paper").eval()(x))


def test_convert_as_json_names_the_file_and_its_hash(run):
    status, out, _ = run("convert", NET, "--model-arg", "width=2", "-o", "a.safetensors", "--json")
    found = strict(out)
    assert status == 0 and found["output"] == "a.safetensors" and found["hash"] == tnn.load("a.safetensors").hash


def test_a_model_that_no_recipe_rewrites_has_status_1(run):
    assert "no residual block" in fails(run, "plan", "torch.nn:Linear", "--model-arg", "in_features=2",
                                        "--model-arg", "out_features=2", status=1)  # fmt: skip


def test_a_users_own_file_is_found(run, tmp_path):
    (tmp_path / "mine.py").write_text(f"from {NET.split(':')[0]} import PreActResNet18\ndef net(w):\n    return PreActResNet18(w)\n")
    for spec in ("mine:net", "mine.py:net"):
        assert run("plan", spec, "--model-arg", "w=2")[0] == 0


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was run",)


MODEL_MISTAKES = {
    "no colon": (["torch.nn"], "needs the form module:callable"),
    "no module": (["nosuch.module:net"], "No module named 'nosuch'"),
    "no name": (["torch.nn:Nosuch"], "has no Nosuch"),
    "no callable": (["math:pi"], "is a float"),
    "no file": (["nosuch.py:net"], "importing nosuch.py raised"),
    "broken file": (["broken.py:net"], "importing broken.py raised SyntaxError"),
    "no arguments": (["torch.nn:Linear"], "raised TypeError"),
    "no model": (["builtins:dict"], "gave a dict"),
    "argument": ([NET, "--model-arg", "width"], "needs the form key=value"),
    "sample": ([NET, "--sample-shape", "1x3"], "needs sizes with commas"),
    "missing": ([NET, "--checkpoint", "nosuch.pt"], "cannot be read"),
    "folder": ([NET, "--checkpoint", "."], "cannot be read"),
    "text": ([NET, "--checkpoint", "broken.py"], "neither safetensors nor"),
    "pickle": ([NET, "--checkpoint", "bad.pkl"], "could run code, so it was left"),
    "malicious": ([NET, "--checkpoint", "bad.pt"], "could run code, so it was left"),
    "no state": ([NET, "--checkpoint", "list.pt"], "is no state_dict"),
    "other model": ([NET, "--checkpoint", "other.safetensors"], "its keys are not the model's"),
    "converted": ([NET, "--checkpoint", "converted.safetensors"], "is converted already"),
    "cut": ([NET, "--checkpoint", "cut.safetensors"], "is damaged"),
}


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "broken.py").write_text("def net(:\n")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Malicious()))
    torch.save({"weight": Malicious()}, "bad.pt")
    torch.save([torch.zeros(1)], "list.pt")
    safetensors.torch.save_file({"weight": torch.zeros(1)}, "other.safetensors")
    tnn.save(tnn.convert_model(PreActResNet18(2), "paper"), "converted.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "converted.safetensors").read_bytes()[:-9])


@pytest.mark.parametrize("options, words", MODEL_MISTAKES.values(), ids=MODEL_MISTAKES)
def test_a_mistake_in_plan_is_one_clear_line_and_runs_nothing(run, bad_files, options, words):
    assert re.search(words, fails(run, "plan", *options))
    assert not pathlib.Path("was run").exists()


def test_convert_to_a_folder_that_is_not_there_is_one_clear_line(run):
    assert "folder that does not exist" in fails(run, "convert", NET, "-o", "nowhere/a.safetensors")
    assert "--output" in fails(run, "convert", NET)


@needs_real_models
def test_resnet18_of_torchvision_is_planned_and_converted(run):
    import_real("torchvision")
    status, out, _ = run("plan", "torchvision.models:resnet18")
    assert status == 0 and "8 of 8 places change" in out
    status, out, _ = run("plan", "torchvision.models:resnet18", "--post-activation", "--json")
    changed = [step["path"] for step in strict(out)["steps"] if step["before"] != step["after"]]
    assert status == 0 and changed == ["layer2.0", "layer3.0", "layer4.0"]
    status, _, _ = run("convert", "torchvision.models:resnet18", "-o", "r.safetensors")
    assert status == 0 and tnn.load("r.safetensors").origin["factory"] == "torchvision.models:resnet18"


# The way in


def module(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "trainable_nn", *arguments],
        cwd=pathlib.Path(tnn.__file__).parents[1], capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def test_the_module_alone_says_which_kernels_are_active():
    done = module()
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"trainable_nn {tnn.__version__}", *tnn.ops.native.report().splitlines()]


def test_the_module_with_arguments_is_the_command_line():
    done = module("plan", NET, "--model-arg", "width=2")
    assert done.returncode == 0 and "3 of 8 places" in done.stdout
    assert module("plan", "nosuch:net").returncode == 2


def test_help_is_there_for_every_command(run):
    for command, words in (("demo", "--optimizer"), ("plan", "--keep"), ("convert", "--output")):
        status, out, _ = run(command, "--help")
        assert status == 0 and words in out
    status, out, err = run()
    assert status == 2 and "demo" in out + err


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "trainable_nn", "plan", NET, "--json"]
    with subprocess.Popen(command, cwd=pathlib.Path(tnn.__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert "Traceback" not in child.stderr.read().decode()

"""Two processes of DistributedDataParallel give the gradients of one process; all modules in one run."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from law_cases import CASES
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def _couples_samples(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())  # as the control does


WITH_WEIGHTS = [name for name, case in CASES.items() if case.keys and not _couples_samples(case.build())]


def model_and_batch(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Equal in every process; the control normalises over its batch, so it must differ."""
    torch.manual_seed(4)
    if name == "control":
        return nn.BatchNorm1d(6).double(), torch.randn(4, 6, dtype=torch.float64)
    case = CASES[name]
    return case.build().double(), torch.randn(4, *case.shape, dtype=torch.float64)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model(x).sin().flatten(1).sum(1).mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for name in (*WITH_WEIGHTS, "control"):
        model, x = model_and_batch(name)
        found[name] = gradients(DistributedDataParallel(model), x.chunk(2)[rank])
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_gloo_ranks_give_the_gradients_of_one_process(tmp_path):
    mp.spawn(work, args=(free_port(), str(tmp_path)), nprocs=2)
    assert len(WITH_WEIGHTS) > 12 and "SpectrallyBoundedResidual" in WITH_WEIGHTS
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in WITH_WEIGHTS:
        alone = gradients(*model_and_batch(name))
        for rank in (0, 1):
            torch.testing.assert_close(found[rank][name], alone, rtol=1e-10, atol=1e-12, msg=f"{name}, rank {rank}")
    control = gradients(*model_and_batch("control"))
    assert not torch.allclose(found[0]["control"][0], control[0], rtol=1e-3)  # the comparison can fail

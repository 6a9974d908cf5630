"""The one torchrun path: start-up, sharding, one video or sample on many ranks.

One process, `torchrun --nproc-per-node N` and several nodes run the same code: a single process is a world of one. FSDP2
shards parameters, gradients and optimizer state in float32 and computes in bfloat16; it is applied here, from outside,
and the model never knows.
"""

import math
import os
import shutil
import sys
import time
import uuid
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from attention import attention
from checkpoint import BadInput

PATIENCE = timedelta(minutes=10)
SMALL = 2**30  # bytes of gathered weights that a rank may keep from the forward to the backward pass


@dataclass
class Ranks:
    """This process among all."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    patient: dist.ProcessGroup | None = None  # for wait()
    sequence: int = 1  # ranks that share each training sample, neighbours

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks get the same answer."""
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def wait(self) -> None:
        """Until all ranks are here, however long their shares of some work take them."""
        dist.barrier(group=self.patient)

    def from_first(self, number: int) -> int:
        """The first rank's number."""
        value = torch.tensor(number, device=self.device)
        dist.broadcast(value, 0)
        return int(value.item())

    def mean(self, value: Tensor) -> float:
        """The mean over ranks of a scalar."""
        value = value.detach().double().to(self.device).clone()
        dist.all_reduce(value)
        return (value / self.world).item()

    def share(self, batch: int) -> range:
        """Which samples of a global batch this rank takes."""
        groups, number = self.world // self.sequence, self.rank // self.sequence
        if batch % groups:
            who = f"{groups} ranks" if self.sequence == 1 else f"{groups} groups of {self.sequence} ranks"
            raise BadInput(f"A batch of {batch} cannot be shared out evenly among {who}: choose a multiple.")
        size = batch // groups
        return range(number * size, (number + 1) * size)


def place() -> tuple[int, int]:
    """This process's number, and how many there are, as torchrun's environment says: 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def find_device(name: str | None) -> torch.device:
    """The device of this process: under torchrun each rank of a node has a GPU of its own, whatever the name's number."""
    kind, _, index = (name or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    try:
        where = torch.device(kind, int(os.environ.get("LOCAL_RANK", index or 0))) if kind == "cuda" else torch.device(name or kind)
        torch.empty(0, device=where)
        if kind == "cuda":  # for what asks for no device, such as pinning memory: else every rank would be on the first GPU too
            torch.cuda.set_device(where)
    except (RuntimeError, AssertionError, ValueError) as error:
        on = f"--device {name}" if name else f"GPU {os.environ.get('LOCAL_RANK', 0)}, for the rank of that number,"
        raise BadInput(f"{on} cannot be used here: {str(error).splitlines()[0]}") from error
    return where


def start(device: str | None = None, sequence: int = 1) -> Ranks:
    """Joins the process group that torchrun's environment describes, or makes one of a single process. sequence: how many
    ranks share each training sample."""
    rank, world = place()
    if sequence < 1 or world % sequence:
        raise BadInput(f"--sequence-parallel {sequence} does not divide the {world} ranks.")
    where = find_device(device)
    kind = where.type
    if not dist.is_initialized():
        # A rank that waits longer than this for another will not see it again: it ends, and torchrun starts all anew.
        store = unused_part(*next(dist.rendezvous("env://"))) if "RANK" in os.environ else dist.HashStore()
        # Of an error nccl leaves a note in torchrun's store, past unused_part(), on seeing which restarted ranks would abort.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE, store=store, rank=rank,
                                world_size=world)
    return Ranks(rank, world, where, *joined(kind, world), sequence)


@lru_cache(maxsize=None)
def joined(kind: str, world: int) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """The ranks' mesh, and a group for wait(): made once, as each has threads and connections of its own."""
    return init_device_mesh(kind, (world,)), dist.new_group(backend="gloo", timeout=timedelta(days=30))


def unused_part(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the store that no rank has written to. When torchrun starts the ranks anew after one has died, its store is
    still full of the addresses of the dead (PyTorch issue 135712), and nodes count restarts each for itself. So rank 0 counts
    the rounds, and tells every rank that calls it by a name that no rank had before, until all have heard."""
    call = uuid.uuid4().hex
    store.set_timeout(PATIENCE)
    store.set(f"call/{rank}", call)
    if rank == 0:
        number, deaf, deadline = store.add("round", 1), set(range(1, world)), time.monotonic() + PATIENCE.total_seconds()
        while deaf:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Ranks {sorted(deaf)} did not answer for {PATIENCE}.")
            for other in deaf:
                store.set(f"answer/{store.get(f'call/{other}').decode()}", str(number))  # it may be the call of a dead one
            time.sleep(0.02)
            deaf = {other for other in deaf if not store.check([f"heard/{number}/{other}"])}
    else:
        number = store.get(f"answer/{call}").decode()
        store.set(f"heard/{number}/{rank}", "")
    return dist.PrefixStore(f"round-{number}", store)


def leave(status: int) -> NoReturn:
    """Ends this process with an exit status, without Python's own clearing up: while that goes on, threads of the process
    group still run, and now and then they abort a process that has done all its work."""
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shard(model: nn.Module, blocks: list[nn.Module], ranks: Ranks, dtype: torch.dtype = torch.bfloat16,
          recompute: str | None = None, compiled: bool = False) -> None:
    """FSDP2: each block is gathered for its own forward and backward pass only; where the whole model is small, once for both.
    Parameters keep their type, are gathered and computed with in `dtype`, and gradients are averaged over ranks in float32. A single rank
    uses frozen parameters of that type as they are: to gather them would only copy them.

    recompute: activation checkpointing, see recompute_blocks().
    compiled: torch.compile, block by block, so that one compilation serves them all.
    """
    if compiled:
        compile_blocks(blocks)
    if recompute:
        recompute_blocks(blocks, recompute == "keep-attention")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    as_it_lies = {p for p in model.parameters() if ranks.world == 1 and not p.requires_grad and p.dtype == dtype}
    large = sum(p.numel() for p in model.parameters() if p not in as_it_lies) * dtype.itemsize > SMALL
    for block in blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=large, ignored_params=as_it_lies)
    for block, following in zip(blocks, blocks[1:]):  # gathered while the block before computes
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if ranks.sequence > 1:
        mesh = init_device_mesh(ranks.device.type, (ranks.world // ranks.sequence, ranks.sequence), mesh_dim_names=("data", "sequence"))
        split_sequence(model, mesh["sequence"])
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, ignored_params=as_it_lies)


def reshard(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows, FSDP2 leaves some weights whole, in the type of the computation, in the place
    of the float32 parts: this puts those back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_compiler(device: str) -> None:
    """Raises where torch.compile would fail: it writes C++ for the CPU and Triton for a GPU."""
    if device.startswith("cuda"):  # Triton has its launchers compiled from C
        c = any(shutil.which(name) for name in ([os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]))
        missing = "the package triton" if not find_spec("triton") else "" if c else "a C compiler (gcc, clang, or what CC names)"
    else:
        missing = "" if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler (g++, or what CXX names)"
    if missing:
        raise BadInput(f"--compile needs {missing}.")


def compile_blocks(blocks: list[nn.Module]) -> None:
    """torch.compile on the forward pass of each block. The blocks are alike, so the first one's code serves all; the hooks of
    FSDP2, of streaming and of split_video() stay outside, and so do the names of the parameters."""
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def recompute_blocks(blocks: list[nn.Module], keep_attention: bool) -> None:
    """Activation checkpointing. Of each block only the input is kept, the rest is computed again in the backward pass.
    keep_attention: all but the outcome of its attention, which is as large as the input and takes the longest to compute."""
    kernels = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    kept = [getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in kernels]
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if keep_attention else {}
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False, **selective)


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a sharded model, but for what is frozen, on the CPU of the first rank; the others get none. All ranks must
    call it."""
    tensors, frozen = {}, {key for key, p in model.named_parameters() if not p.requires_grad}
    for key, value in model.state_dict().items():
        if key not in frozen:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if dist.get_rank() == 0:
                tensors[key] = whole.detach().cpu()
    return tensors


# --- one video on many ranks ------------------------------------------------------------------------------------------
#
# Guidance branches first: each group of ranks predicts some of them. Within a group the sequence: every rank holds a part of
# each stream of tokens, and for the attention alone trades it for all tokens of some heads (Ulysses). Both by hooks from
# outside; the model, the sampling loop and the trainers never know.


class Trade(torch.autograd.Function):
    """x [ranks, ...]: row i goes to rank i, and row i of the result came from there. Gradients go back the same way."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.contiguous()
        got = torch.empty_like(x)
        dist.all_to_all_single(got, x, group=group)
        return got

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return Trade.apply(grad, ctx.group), None


class Gather(torch.autograd.Function):
    """The parts of all ranks, joined along dimension 1. Every rank computes the same loss from them, and FSDP2 averages
    over ranks gradients that should be summed over parts: so each rank's is multiplied by the number of ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, parts = group, [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.size() * grad.chunk(ctx.group.size(), dim=1)[ctx.group.rank()], None


def video_groups(world: int, branches: int, heads: int) -> tuple[int, int]:
    """How many groups of ranks share out the guidance branches, and how many ranks of a group share the sequence."""
    groups = math.gcd(world, branches)
    within = world // groups
    if heads % within:
        raise BadInput(f"{world} ranks cannot share a video of this model: after {groups} for the {branches} branches of guidance, its "
                       f"{heads} heads do not divide among {within}.")
    return groups, within


def split_video(model: nn.Module, ranks: Ranks, branches: int) -> None:
    """Makes the ranks share every forward pass of `model`, of which each gets the whole result. branches: the batch that
    guidance asks for; ranks are split among them as far as both have divisors in common."""
    groups, within = video_groups(ranks.world, branches, model.config.num_attention_heads)
    mesh = init_device_mesh(ranks.device.type, (groups, within), mesh_dim_names=("branch", "sequence"))
    if groups > 1:
        split_batch(model, mesh["branch"])
    if within > 1:
        split_sequence(model, mesh["sequence"])


def split_batch(model: nn.Module, mesh: DeviceMesh) -> None:
    """Each rank of the mesh runs its share of the batch; surplus ranks repeat the last sample."""
    group, rank, world, sizes = mesh.get_group(), mesh.get_local_rank(), mesh.size(), []

    def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        n = args[0].shape[0]
        share = -(-n // world)
        sizes.append(n)

        def mine(x):
            if not isinstance(x, Tensor):
                return x
            part = x[min(rank * share, n - 1) :][:share]
            return torch.cat([part, *[part[-1:]] * (share - len(part))]) if len(part) < share else part

        return tuple(map(mine, args)), {name: mine(value) for name, value in kwargs.items()}

    def gather(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        parts = [torch.empty_like(out) for _ in range(world)]
        dist.all_gather(parts, out.contiguous(), group=group)
        return torch.cat(parts)[: sizes.pop()]

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.register_forward_hook(gather)


def split_sequence(model: nn.Module, mesh: DeviceMesh) -> None:
    """Ulysses: a rank holds the same share of the text, the reference and the video, each padded to a multiple of the ranks."""
    group, rank, world, now = mesh.get_group(), mesh.get_local_rank(), mesh.size(), {}
    first, last = model.transformer_blocks[0], model.transformer_blocks[-1]

    def part(x: Tensor, dim: int) -> Tensor:
        """This rank's share of x along dim, zeros behind its end."""
        share = -(-x.shape[dim] // world)
        low, high = min(rank * share, x.shape[dim]), min((rank + 1) * share, x.shape[dim])
        mine = x.narrow(dim, low, high - low)
        missing = mine.new_zeros(*mine.shape[:dim], share - (high - low), *mine.shape[dim % mine.dim() + 1 :])
        return torch.cat([mine, missing], dim=dim)

    def enter(block: nn.Module, args: tuple) -> tuple:
        x, lengths, temb, rotary, segments, key_mask, lora = args
        if block is first:
            shares = [-(-length // world) for length in lengths]
            held = [[min(max(length - r * share, 0), share) for r in range(world)] for length, share in zip(lengths, shares)]
            now.update(shares=tuple(shares), held=held, video=lengths[2], rotary=None, lora=None)
            if rotary is not None:
                now["rotary"] = torch.cat([part(y, y.dim() - 2) for y in rotary.split(lengths[1:], dim=-2)], dim=-2)
            if lora is not None:
                now["lora"] = slice(shares[0], shares[0] + shares[1])
            x = torch.cat([part(y, 1) for y in x.split(lengths, dim=1)], dim=1)
        return x, now["shares"], temb, now["rotary"], segments, key_mask, now["lora"]

    def attend(q: Tensor, k: Tensor, v: Tensor, segments, key_mask: Tensor | None) -> Tensor:
        """q, k, v [B, heads, L / world, d], of this rank's tokens."""
        # [world, 3, B, heads / world, L / world, d]
        sent = torch.stack([x.unflatten(1, (world, -1)).movedim(1, 0) for x in (q, k, v)], dim=1)
        came = [x.split(now["shares"], dim=3) for x in Trade.apply(sent, group)]  # from each rank, of each stream
        whole = torch.cat([came[r][i].narrow(3, 0, n) for i, held in enumerate(now["held"]) for r, n in enumerate(held)], dim=3)
        seen = attention(*whole, segments, key_mask)  # [B, heads / world, L, d]
        parts = iter(seen.split([n for held in now["held"] for n in held], dim=2))
        back: list[list[Tensor]] = [[] for _ in range(world)]  # to each rank, of each stream, with zeros where it has padding
        for share, held in zip(now["shares"], now["held"]):
            for r, n in enumerate(held):
                part = next(parts)
                back[r] += [part, part.new_zeros(*part.shape[:2], share - n, part.shape[3])]
        return Trade.apply(torch.stack([torch.cat(of_rank, dim=2) for of_rank in back]), group).movedim(0, 1).flatten(1, 2)

    def gather(block: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return Gather.apply(out[:, -now["shares"][2] :], group)[:, : now["video"]]  # of the others nothing is asked any more

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(enter)
        block.attn1.attend = torch.compiler.disable(attend)
    last.register_forward_hook(gather)

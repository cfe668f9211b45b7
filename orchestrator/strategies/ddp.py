"""Strategy `ddp`: torch's DistributedDataParallel, made restartable bit for bit and transparent to the user."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.errors import UsageError
from orchestrator.strategies.base import ForwardCallback, ForwardListeners, check_options
from orchestrator.strategies.exchange import CommHook, Exchange
from orchestrator.strategies.none import ddp_options

_INNER = "module."


class DataParallel(DistributedDataParallel):
    """DDP whose bucket layout is final from the start and whose wrapped module shows through.

    DDP rebuilds its buckets in the order in which the first backward pass of a *process* delivers gradients; after a
    restart the sums would be taken in another order. Here the buckets are laid out in reverse parameter order and
    rebuilt at once, so the layout is a function of the model alone. `_settled` says whether that worked.

    Attributes unknown to DDP are those of the wrapped module, to read and, where it has them, to write. Names in
    `state_dict`, `load_state_dict`, `named_parameters` and `named_buffers` are the wrapped module's: no `module.`.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.__dict__["_exchange"] = Exchange()
        super().__init__(module, **options)
        self._register_state_dict_hook(_without_inner_prefix)
        self.register_load_state_dict_pre_hook(_with_inner_prefix)
        self._settled = self._settle()
        if self._settled:
            parameters, _ = super()._build_params_for_reducer()
            self._exchange.watch(parameters, repeats=self.static_graph)

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        # A reducer that looks for unused parameters keeps the layout it starts with, and DDP reverses that one itself.
        return (parameters, sparse) if self.find_unused_parameters else (parameters[::-1], sparse[::-1])

    def _settle(self) -> bool:
        """Bring the reducer to its final layout; False, the same on all ranks, if this torch cannot do that.

        No gradient, generator, buffer or autograd node takes part: parameters are pushed by index, and the layout
        of rank 0 is broadcast. Measured: 1 to 4 ms with 3 ranks on 2 cores and 162 parameters.
        """
        if self._delay_all_reduce_all_params or self._use_python_reducer or self.find_unused_parameters:
            return True
        verdict = torch.tensor([int(self._rebuild_once())], device=self.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=self.process_group)
        return bool(verdict.item())

    def _rebuild_once(self) -> bool:
        try:
            self.reducer._push_all_rebuilt_params()
            rebuilt = self.reducer._rebuild_buckets()
            self.reducer._push_all_rebuilt_params()
            again = self.reducer._rebuild_buckets()
        except AttributeError:  # the only way in which a later torch may lack these private calls
            return False
        return rebuilt is True and again is False

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        exchange = self.__dict__.get("_exchange")
        if exchange is not None and torch.is_grad_enabled():
            exchange.forward_begins(self.require_backward_grad_sync)
        if self._modules["module"].training:
            return super().forward(*inputs, **kwargs)
        # Evaluation changes no buffers, and ranks may evaluate different numbers of batches: nothing may wait for others.
        synced, self.require_forward_param_sync = self.require_forward_param_sync, False
        try:
            return super().forward(*inputs, **kwargs)
        finally:
            self.require_forward_param_sync = synced

    def register_comm_hook(self, state: object, hook: CommHook) -> None:
        """As torch's. The gradients handed to `hook` are weighted by this rank's share where shares differ."""
        if self._exchange.inner is not None:
            raise RuntimeError("register_comm_hook can only be called once.")
        self._check_comm_hook(hook)
        self._exchange.inner = (hook, state)
        self._register_exchange()

    def _register_exchange(self) -> None:
        if not self._exchange.registered:
            exchange = self._exchange

            def weighted_sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
                return exchange.reduce(group, bucket)

            # Without annotations: torch compares them with types, and here they are strings.
            weighted_sum.__annotations__ = {}
            super().register_comm_hook(self.process_group, weighted_sum)
            exchange.registered = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        module = self.__dict__.get("_modules", {}).get("module")
        own = module is None or name in self.__dict__ or name.startswith("_") or hasattr(type(self), name)
        if not own and name != "module" and "_lazy_init_ran" in self.__dict__ and hasattr(module, name):
            setattr(module, name, value)
        else:
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The wrapped module's, by its own names."""
        return self.module.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The wrapped module's, by its own names."""
        return self.module.named_buffers(prefix, recurse, remove_duplicate)

    def __getstate__(self) -> dict[str, Any]:
        # A copy (an EMA shadow) takes no part in the exchange; torch gives it a reducer of its own.
        state: dict[str, Any] = super().__getstate__()
        state.pop("_exchange", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_exchange"] = Exchange()


def _without_inner_prefix(wrapper: nn.Module, state: dict[str, Any], prefix: str, local_metadata: object) -> None:
    inner = prefix + _INNER
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)
    metadata = getattr(state, "_metadata", {})
    for key in [key for key in metadata if (key + ".").startswith(inner)]:
        # Kept under both names: loading into a wrapper looks for the one, loading into a plain module for the other.
        metadata.setdefault((prefix + key[len(inner) :]).rstrip("."), metadata[key])


def _with_inner_prefix(wrapper: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Accepts the wrapped module's names, and those of a plain DDP as older files have them."""
    inner = prefix + _INNER
    own = [key for key in state if key.startswith(prefix)]
    if own and all(key.startswith(inner) for key in own) and not hasattr(wrapper._modules["module"], "module"):
        return
    for key in own:
        state[inner + key[len(prefix) :]] = state.pop(key)


class DdpStrategy:
    """Every rank holds the whole model; gradients are averaged, weighted by the ranks' shares of the global batch."""

    name = "ddp"

    def __init__(self) -> None:
        self._wrapped: weakref.WeakSet[DataParallel] = weakref.WeakSet()
        self._listeners = ForwardListeners()
        self._warned = False

    def wrap(self, module: nn.Module, device: torch.device, **options: Any) -> nn.Module:
        """As in the Protocol. Broadcasts rank 0's parameters and buffers, unless `init_sync=False` is given."""
        check_options(options, ddp_options())
        module = module.to(device)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            self._listeners.listen(module)
            return module
        if device.type == "cuda":
            options.setdefault("device_ids", [device])
        wrapped = DataParallel(module, **options)
        if not wrapped._settled:
            wrapped = self._unsettled(module, options, wrapped)
        self._wrapped.add(wrapped)
        # To the wrapper, not to what it wraps: a callback may call `set_sync`, and DDP looks at that once more after the
        # wrapped module's forward.
        self._listeners.listen(wrapped)
        return wrapped

    def _unsettled(self, module: nn.Module, options: dict[str, Any], failed: DataParallel) -> DataParallel:
        failed._remove_autograd_hooks()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"torch {torch.__version__} does not let DDP's gradient buckets be laid out before the first step, so "
                "modules are wrapped with find_unused_parameters=True: a restarted run stays bitwise equal, at the "
                "price of a search for unused parameters in each step.",
                stacklevel=3,
            )
        return DataParallel(module, **{**options, "find_unused_parameters": True, "static_graph": False})

    def set_share(self, weight: float | None) -> None:
        """As in the Protocol. Raises UsageError for a weight outside 0 … 1."""
        if weight is not None and not 0 <= weight <= 1:
            raise UsageError(f"A rank's share of a global batch lies between 0 and 1; got {weight}.")
        for wrapped in self._wrapped:
            if weight is not None:
                wrapped._register_exchange()
            wrapped._exchange.weight = weight

    def set_sync(self, sync: bool) -> None:
        """As in the Protocol."""
        for wrapped in self._wrapped:
            wrapped.require_backward_grad_sync = sync

    def exchanged(self, parameters: Iterable[nn.Parameter] | None = None) -> bool:
        """As in the Protocol."""
        owing = [wrapped for wrapped in self._wrapped if not wrapped._exchange.exchanged]
        if not owing or parameters is None:
            return not owing
        asked = {id(parameter) for parameter in parameters}
        return not any(id(own) in asked for wrapped in owing for own in wrapped._exchange.parameters)

    def share_buffers(self) -> None:
        """As in the Protocol."""
        for wrapped in self._wrapped:
            if wrapped.broadcast_buffers and any(True for _ in wrapped.module.buffers()):
                wrapped._sync_buffers()

    def on_forward(self, callback: ForwardCallback, also: nn.Module | None = None) -> None:
        """As in the Protocol."""
        self._listeners.add(callback)
        if also is not None:
            self._listeners.listen(also)

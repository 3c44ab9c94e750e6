"""The process group of one replica: its ranks meet, exchange rows of tensors, and part.

Gloo carries what lies on a CPU, and always the few numbers that steer the ranks, so that no step
waits for a GPU to know whether there is one; NCCL carries what lies on a GPU.
"""

import contextlib
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from granite_ray.errors import InfrastructureError
from granite_ray.parallel.place import RankPlace

BACKLOG = 1024

dist: Any = torch.distributed  # its own types leave out most of what a backend can do


def open_meeting(host: str, timeout_s: float) -> tuple[Any, int]:
    """Open the leader's store on a port that the system chooses, on `host` alone.

    Returns:
        The store, which serves for as long as the caller keeps it, and its port.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen(BACKLOG)
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, port


class Group:
    """A replica's ranks as one of them sees it. Each call is made by all ranks, in one order.

    Exchanges are possible after `join`. They raise RuntimeError at once where another rank has
    gone, and after `place.timeout_s` where one does not come; the group is of no use then.

    Attributes:
        num_bytes_sent: Bytes of tensors sent to other ranks so far.
    """

    def __init__(self, place: RankPlace) -> None:
        self.rank, self.size = place.rank, place.size
        self.num_bytes_sent = 0
        self._place = place
        self._patience = timedelta(seconds=place.patience_s)
        self._store = dist.TCPStore(*place.meeting, is_master=False, timeout=self._patience)
        self._steering: Any = None
        self._carrying: Any = None

    def join(self, device: torch.device) -> None:
        """Connect with the others, for tensors on `device`.

        Raises:
            InfrastructureError: If they do not come in `place.patience_s`.
        """
        self.meet("loaded")
        self._steering = self._carrying = _join_gloo(self._store, self._place)
        if device.type == "cuda":
            self._carrying = _join_nccl(self._store, self._place)

    def meet(self, name: str) -> None:
        """Wait until all ranks have come as far as `name`, a word that is used once.

        Raises:
            InfrastructureError: If they do not come in `place.patience_s`.
        """
        try:
            self._store.set(f"{name}/{self.rank}", "")
            self._store.wait([f"{name}/{rank}" for rank in range(self.size)], self._patience)
        except RuntimeError as error:
            raise InfrastructureError(
                f"Rank {self.rank} of {self.size} waited for the others, {name}, in vain "
                f"({self._place.patience_s:g} s at most): one of them has failed or is slow."
            ) from error

    def agree(self, value: int) -> int:
        """Return the largest of all ranks' values."""
        values = torch.tensor([value])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        assert self._steering is not None, "not joined"
        self._steering.allreduce([values], options).wait()
        return int(values)

    def exchange(
        self,
        sent: torch.Tensor,
        received: torch.Tensor,
        sent_counts: Sequence[int],
        received_counts: Sequence[int],
    ) -> None:
        """Send `sent_counts[r]` rows of `sent` to each rank r, and receive likewise, in its order.

        Rows are those of the first dimension; both tensors are contiguous.
        """
        assert self._carrying is not None, "not joined"
        num_elsewhere = len(sent) - sent_counts[self.rank]
        self.num_bytes_sent += num_elsewhere * sent[0].nbytes if len(sent) else 0
        counts = list(received_counts), list(sent_counts)
        self._carrying.alltoall_base(received, sent, *counts).wait()

    def tell(self, tensor: torch.Tensor) -> None:
        """Give all ranks the leader's tensor."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        assert self._carrying is not None, "not joined"
        self._carrying.broadcast([tensor], options).wait()

    def close(self) -> None:
        """Leave: ranks that still wait for this one hear of it at once."""
        for backend in {self._steering, self._carrying} - {None}:
            with contextlib.suppress(RuntimeError):  # it may have failed before
                backend.abort()
        self._steering = self._carrying = None


def _join_gloo(store: Any, place: RankPlace) -> Any:
    options = dist.ProcessGroupGloo._Options()
    # By default gloo asks for this machine's name, which another node may not reach.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=place.host)]
    options._timeout = timedelta(seconds=place.timeout_s)
    own = dist.PrefixStore("steering", store)
    return dist.ProcessGroupGloo(own, place.rank, place.size, options)


def _join_nccl(store: Any, place: RankPlace) -> Any:
    """Join over GPUs. Not yet run on any."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=place.timeout_s)
    own = dist.PrefixStore("carrying", store)
    return dist.ProcessGroupNCCL(own, place.rank, place.size, options)

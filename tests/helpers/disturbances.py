"""Disturbances of a service: workers that are killed, a disk that is full, and the memory meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from services import Server, kill

FULL_SECONDS = 15.0


class Disturbances:
    """What happens to a service meanwhile.

    Args:
        server: the service.
        share: of the requests, those that have ended.
        kills: how often its worker is killed.
        disk: the disk under its data, or None if it cannot be filled.

    Attributes:
        kills: workers that were killed.
        full: seconds that the disk was full; None if there is no disk to fill.
        memory: resident bytes of the service and of its worker, by share.
    """

    def __init__(self, server: Server, share: Callable[[], float], kills: int, disk: Path | None) -> None:
        self._server, self._share, self._disk = server, share, disk
        self._http = httpx.AsyncClient(base_url=server.url, timeout=60)
        # The last fifth is undisturbed, so that the last worker's memory is seen to be flat.
        self._kill_at = [0.03 + 0.75 * number / max(kills, 1) for number in range(kills)]
        self.kills, self.full = 0, None if disk is None else 0.0
        self.memory: list[tuple[float, int, int | None]] = []

    async def kill_workers(self) -> None:
        """Kill the worker at its times; each time another one, which is ready."""
        for share in self._kill_at:
            while self._share() < share or not await self._is_ready():
                await asyncio.sleep(0.1)
            kill(self._server.workers()[0])
            self.kills += 1
            while await self._is_ready():
                await asyncio.sleep(0.02)

    async def fill_disk(self) -> None:
        """Fill the disk for a while, when half of the requests have ended."""
        while self._disk is not None and self._share() < 0.45:
            await asyncio.sleep(0.1)
        if self._disk is None:
            return
        ballast, start = self._disk / "ballast", time.monotonic()
        await asyncio.to_thread(fill, ballast)
        while time.monotonic() - start < FULL_SECONDS:
            await asyncio.sleep(0.05)
            await asyncio.to_thread(fill, ballast)  # what pruning and checkpoints made free
        ballast.unlink()
        self.full = time.monotonic() - start

    async def watch_memory(self) -> None:
        """Note the memory at every twentieth of the requests."""
        for step in range(21):
            while self._share() < step / 20:
                await asyncio.sleep(0.1)
            workers = self._server.workers()
            service = resident(self._server.process.pid)
            assert service is not None
            self.memory.append((step / 20, service, resident(workers[0]) if workers else None))

    async def _is_ready(self) -> bool:
        return (await self._http.get("/readyz")).status_code == 200


def fill(path: Path) -> None:
    """Append to a file until its disk is full."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def resident(pid: int) -> int | None:
    """Resident bytes of a process; None if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = next((line for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return None if found is None else int(found.split()[1]) << 10


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A tmpfs at a folder, or None where it cannot be mounted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            # Lazily: who looks at the folder from outside must not cost the figures.
            subprocess.run(["umount", "--lazy", folder], check=True)

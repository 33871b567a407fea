"""The websockets of ComfyUI's clients, and what is sent to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from fastapi import WebSocket

# Messages that may wait for a client that reads slowly; beyond, previews are left out, and then it is cut off.
MAX_PREVIEWS, MAX_MESSAGES = 8, 4096
# Kinds of binary messages, and of the images in the first.
PREVIEW, PREVIEW_WITH_METADATA = 1, 4
JPEG = 1


class Socket:
    """A client's websocket.

    Attributes:
        owner: the key's name.
        sid: the client's id.
        features: what the client says that it takes.
    """

    def __init__(self, websocket: WebSocket, owner: str, sid: str) -> None:
        self._websocket, self.owner, self.sid = websocket, owner, sid
        self.features: Mapping[str, Any] = {}
        self._messages: asyncio.Queue[str | bytes | None] = asyncio.Queue()

    @property
    def takes_metadata(self) -> bool:
        """Whether previews carry the id of their node."""
        return bool(self.features.get("supports_preview_metadata"))

    def send(self, message: str | bytes) -> None:
        """Send a message after those before it."""
        waiting = self._messages.qsize()
        if isinstance(message, bytes) and waiting > MAX_PREVIEWS:
            return
        if waiting < MAX_MESSAGES:
            self._messages.put_nowait(message)
        elif waiting == MAX_MESSAGES:
            self.close()

    def close(self) -> None:
        """End the connection after what waits."""
        self._messages.put_nowait(None)

    async def deliver(self) -> None:
        """Send what waits until the end."""
        while (message := await self._messages.get()) is not None:
            if isinstance(message, bytes):
                await self._websocket.send_bytes(message)
            else:
                await self._websocket.send_text(message)
        with contextlib.suppress(RuntimeError):
            await self._websocket.close()


class Hub:
    """All websockets."""

    def __init__(self) -> None:
        self._sockets: dict[tuple[str, str], Socket] = {}

    def add(self, socket: Socket) -> None:
        """Take a client in; one with its id, which was cut off, is forgotten."""
        former = self._sockets.get((socket.owner, socket.sid))
        if former is not None:
            former.close()
        self._sockets[socket.owner, socket.sid] = socket

    def remove(self, socket: Socket) -> None:
        """Forget a client that has gone."""
        if self._sockets.get((socket.owner, socket.sid)) is socket:
            del self._sockets[socket.owner, socket.sid]

    def owners(self) -> set[str]:
        """The owners that have a client here."""
        return {owner for owner, _ in self._sockets}

    def client(self, owner: str, sid: str | None) -> Socket | None:
        """A client by its id."""
        return None if sid is None else self._sockets.get((owner, sid))

    def send(self, owner: str, sid: str | None, kind: str, data: Mapping[str, Any]) -> None:
        """Send a message to a client, if it is here."""
        socket = self.client(owner, sid)
        if socket is not None:
            socket.send(message_text(kind, data))

    def send_to_all(self, owner: str, kind: str, data: Mapping[str, Any]) -> None:
        """Send a message to all clients of an owner."""
        text = message_text(kind, data)
        for (who, _), socket in list(self._sockets.items()):
            if who == owner:
                socket.send(text)

    def close(self) -> None:
        """End all connections."""
        for socket in list(self._sockets.values()):
            socket.close()


def message_text(kind: str, data: Mapping[str, Any]) -> str:
    """A message as JSON."""
    return json.dumps({"type": kind, "data": data})


def plain_preview(jpeg: bytes) -> bytes:
    """A preview for clients that know nothing of metadata."""
    return struct.pack(">II", PREVIEW, JPEG) + jpeg


def preview_with_metadata(jpeg: bytes, metadata: Mapping[str, Any]) -> bytes:
    """A preview with the node that it belongs to."""
    text = json.dumps({**metadata, "image_type": "image/jpeg"}).encode()
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(text)) + text + jpeg

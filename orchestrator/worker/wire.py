"""JSON messages with file descriptors over a local SOCK_SEQPACKET pair: how agent, zygote, saver and workers talk.

A message that would not fit into a socket buffer travels in a memfd beside the packet. Messages keep their boundaries
and order, and what a process sent before it was killed still arrives.
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

INLINE_LIMIT_BYTES = 48 * 1024
MAX_DESCRIPTORS = 200
_RECEIVE_BYTES = INLINE_LIMIT_BYTES + 1024

Message = dict[str, Any]


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends; both close on exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message. Raises OSError (BrokenPipeError, ConnectionResetError) if the other side is gone."""
    payload = json.dumps(message).encode()
    if len(payload) <= INLINE_LIMIT_BYTES:
        _send(sock, payload, descriptors)
        return
    blob = os.memfd_create("orchestrator-message", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(blob), "wb") as file:
            file.write(payload)
        _send(sock, b"+", (*descriptors, blob))
    finally:
        os.close(blob)


def _send(sock: socket.socket, payload: bytes, descriptors: tuple[int, ...]) -> None:
    if len(descriptors) > MAX_DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors in one message; at most {MAX_DESCRIPTORS} fit")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([payload], ancillary)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors (now owned by the caller), or None when the other side has closed.

    Raises BlockingIOError on a non-blocking socket with nothing to read, RuntimeError if descriptors were lost.
    """
    descriptors = array.array("i")
    space = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * descriptors.itemsize)
    try:
        payload, ancillary, flags, _address = sock.recvmsg(_RECEIVE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    received = list(descriptors)
    if flags & socket.MSG_CTRUNC:
        discard(received)
        raise RuntimeError("a message came without its descriptors: too many open files here; raise `ulimit -n`")
    if not payload:
        discard(received)
        return None
    if payload == b"+":
        blob = received.pop()
        with os.fdopen(blob, "rb") as file:
            file.seek(0)
            payload = file.read()
    return json.loads(payload), received


def discard(descriptors: list[int]) -> None:
    """Close descriptors that came with a message and that nobody took."""
    while descriptors:
        os.close(descriptors.pop())

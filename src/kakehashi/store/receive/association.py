"""One association: what is agreed, and each object from its first byte to its answer."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import itertools
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.store.dicom import UID
from kakehashi.store.layout import PART
from kakehashi.store.receive import dimse, pdu
from kakehashi.store.receive.dimse import Request, Status
from kakehashi.store.receive.entry import Receipt
from kakehashi.store.receive.head import IMPLICIT
from kakehashi.store.receive.offer import NO_ROOM, Offer, Verdict
from kakehashi.store.receive.part import Part
from kakehashi.store.receive.pdu import AbortReason, Answer, Kind, ProtocolError
from kakehashi.store.receive.syntaxes import STORAGE, TRANSFER, VERIFICATION
from kakehashi.store.receive.wire import MAX_LENGTH, Wire

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from kakehashi.store.receive.senders import Senders
    from kakehashi.store.receive.settings import Receive

_LONGEST_COMMAND = 1 << 16
_SMALLEST_MAX_LENGTH = 16


_ANSWERS = {
    Verdict.STORED: Status.SUCCESS,
    Verdict.AGAIN: Status.SUCCESS,
    # It is safe here, and sending it again would not make it better.
    Verdict.HELD: Status.SUCCESS,
    Verdict.NO_ROOM: Status.OUT_OF_RESOURCES,
    Verdict.CROWDED: Status.OUT_OF_RESOURCES,
    Verdict.FAILED: Status.PROCESSING_FAILURE,
}


class Stopped(Exception):  # noqa: N818 - no error: the receiver is asked to end
    """The receiver ends, and nothing is under way here."""


@dataclass(frozen=True, slots=True)
class Host:
    """What all associations share.

    Attributes
    ----------
    settings : Receive
    senders : Senders
    incoming : Path
        Folder for what arrives.
    enter : callable
        Says whether one more association of a hospital may go on.
    place : callable
        Gives an object its place, durably, and says what became of it.
    """

    settings: Receive
    senders: Senders
    incoming: Path
    enter: Callable[[str], bool]
    place: Callable[[Offer], Verdict]


class Association:
    """Serves one caller.

    Parameters
    ----------
    host : Host
    connection : socket
    address : str
        The caller's.
    full : bool
        There are too many associations: refuse this one.
    """

    _numbers = itertools.count()

    def __init__(
        self, host: Host, connection: socket.socket, address: str, *, full: bool = False
    ) -> None:
        self._host = host
        self._wire = Wire(connection, host.settings.idle_s)
        self._address = address
        self._full = full
        self._facility = self._calling = ""
        self._contexts: dict[int, str] = {}
        self._max_length = 0
        self._most = host.settings.max_object_mb << 20
        self._command = bytearray()
        self._request: Request | None = None
        self._part: Part | None = None
        self._ignored = 0
        self._status, self._comment = Status.SUCCESS, ""
        self._stop = self._over = False
        self.counts: Counter[str] = Counter()

    def stop(self) -> None:
        """End after the object under way; called from a signal handler, and of no effect later.

        Raises
        ------
        Stopped
            Nothing is under way.
        """
        self._stop = True
        if not self._busy and not self._over:
            raise Stopped

    def run(self) -> str:
        """Serve until either end ends it.

        Returns
        -------
        str
            How it ended.
        """
        try:
            return self._serve()
        except Stopped:
            return self._abort(AbortReason.NONE, "the receiver stops")
        except ProtocolError as error:
            return self._abort(error.reason, f"aborted: {error}")
        except TimeoutError:
            return self._abort(AbortReason.NONE, "aborted: too slow, or silent")
        except EOFError:
            return "the caller went away"
        except OSError as error:
            return f"the connection broke ({error.strerror or error})"
        finally:
            self._over = True
            if self._part is not None:
                self._part.drop()
            self._wire.finish()

    @property
    def _busy(self) -> bool:
        return bool(self._command) or self._request is not None

    def _abort(self, reason: AbortReason, said: str) -> str:
        with contextlib.suppress(OSError):
            self._wire.send(pdu.build_abort(reason))
        return said

    def _serve(self) -> str:
        kind, body = self._wire.read()
        if kind != Kind.ASSOCIATE_RQ:
            raise _unexpected(kind)
        if refused := self._negotiate(bytes(body)):
            return refused
        self._wire.renew()
        while True:
            kind, body = self._wire.read()
            if kind == Kind.P_DATA:
                for context, command, last, piece in pdu.fragments(body):
                    if command:
                        self._take_command(context, piece, last=last)
                    else:
                        self._take_data(context, piece, last=last)
                if self._stop and not self._busy:
                    raise Stopped
            elif kind == Kind.RELEASE_RQ and not self._busy:
                self._wire.send(pdu.build_release_reply())
                return "released"
            elif kind == Kind.ABORT:
                return "aborted by the caller"
            else:
                raise _unexpected(kind)

    def _negotiate(self, body: bytes) -> str:
        """Answer the request for an association; return why it is refused, if it is."""
        request = pdu.parse_request(body)
        self._calling = request.calling
        facility = self._host.senders.facility(self._address, request.calling)
        why = ""
        if self._full:
            why, transient, source, reason = "too many associations", True, 3, 2
        elif not request.version & 1:
            why, transient, source, reason = "unknown protocol version", False, 2, 2
        elif request.application != pdu.APPLICATION:
            why, transient, source, reason = "unknown application context", False, 1, 2
        elif request.called != self._host.settings.ae_title:
            why, transient, source, reason = "called AE title is not ours", False, 1, 7
        elif facility is None:
            why, transient, source, reason = "calling AE title is no sender's", False, 1, 3
        elif not self._host.enter(facility):
            why, transient, source, reason = "too many of its hospital", True, 3, 2
        if why or facility is None:
            self._wire.send(pdu.build_reject(transient=transient, source=source, reason=reason))
            return f"refused: {why} ({request.calling!r} called {request.called!r})"
        if 0 < request.max_length < _SMALLEST_MAX_LENGTH:
            raise ProtocolError("the caller takes no unit of any useful length")
        self._facility, self._max_length = facility, request.max_length
        answers = tuple(self._answer(context) for context in request.contexts)
        self._wire.send(pdu.build_accept(body, answers, MAX_LENGTH))
        return ""

    def _answer(self, context: pdu.Context) -> Answer:
        transfer = next((uid for uid in context.transfers if uid in TRANSFER), None)
        if context.abstract != VERIFICATION and context.abstract not in STORAGE:
            return Answer(context.number, 3, IMPLICIT)
        if transfer is None:
            return Answer(context.number, 4, IMPLICIT)
        self._contexts[context.number] = transfer
        return Answer(context.number, 0, transfer)

    def _take_command(self, context: int, piece: memoryview, *, last: bool) -> None:
        if self._request is not None or context not in self._contexts:
            raise ProtocolError("a command where none may be", AbortReason.UNEXPECTED_PARAMETER)
        self._command += piece
        if len(self._command) > _LONGEST_COMMAND:
            raise ProtocolError(f"a command of more than {_LONGEST_COMMAND} bytes")
        if not last:
            return
        request = dimse.parse(context, bytes(self._command))
        self._command.clear()
        if request.field & dimse.RESPONSE:
            raise ProtocolError("a response to nothing", AbortReason.UNEXPECTED_PARAMETER)
        self._status, self._comment = self._begin(request)
        if request.data_set:
            self._request = request
        elif request.field != dimse.C_CANCEL:
            self._answer_request(request)

    def _begin(self, request: Request) -> tuple[Status, str]:
        """Look at a command; for an object that is to be taken, open its file."""
        if request.field in {dimse.C_ECHO, dimse.C_CANCEL}:
            return Status.SUCCESS, ""
        if refused := _refusal(request):
            return refused
        settings = self._host.settings
        name = f"{os.getpid()}-{next(self._numbers)}{PART}"
        try:
            self._part = Part(
                self._host.incoming / name, most=self._most, reserve=settings.reserve_mb << 20
            )
        except OSError as error:
            return _failure(error)
        return Status.SUCCESS, ""

    def _take_data(self, context: int, piece: memoryview, *, last: bool) -> None:
        request = self._request
        if request is None or context != request.context:
            raise ProtocolError("a data set where none may be", AbortReason.UNEXPECTED_PARAMETER)
        if self._part is not None:
            try:
                self._part.write(piece)
            except OSError as error:
                self._give_up(error)
        else:
            # The answer to what is refused has its place behind the data set, which ends once.
            self._ignored += len(piece)
            if self._ignored > self._most:
                raise ProtocolError("a refused data set that does not end")
        if last:
            if self._part is not None:
                self._finish(request, self._part)
            self._answer_request(request)
            self._request, self._ignored = None, 0

    def _finish(self, request: Request, part: Part) -> None:
        try:
            receipt, reason = part.seal(
                Receipt(
                    received_at=dt.datetime.now(dt.UTC),
                    facility=self._facility,
                    calling=self._calling,
                    address=self._address,
                    sop_class=request.sop_class,
                    sop=request.sop,
                    transfer_syntax=self._contexts[request.context],
                    study="",
                    series="",
                    size=0,
                    sha256="",
                )
            )
        except OSError as error:
            self._give_up(error)
            return
        verdict = self._host.place(Offer(part.path.name, receipt, reason))
        # Its file is no longer ours, except where it was left behind.
        if verdict in {Verdict.NO_ROOM, Verdict.CROWDED, Verdict.FAILED}:
            part.drop()
        self._part = None
        self._status = _ANSWERS[verdict]
        if verdict is Verdict.CROWDED:
            self._comment = "the object is odd, and the quarantine is full"
        self.counts[verdict] += 1

    def _give_up(self, error: OSError) -> None:
        """Take the half object away; what follows of it is read and forgotten."""
        self._status, self._comment = _failure(error)
        if self._part is not None:
            self._part.drop()
            self._part = None

    def _answer_request(self, request: Request) -> None:
        if self._status is not Status.SUCCESS:
            self.counts["refused"] += 1
        response = dimse.build_response(request, self._status, self._comment)
        self._wire.send(pdu.build_command(request.context, response, self._max_length))
        self._wire.renew()


def _refusal(request: Request) -> tuple[Status, str] | None:
    if request.field != dimse.C_STORE:
        return Status.UNRECOGNIZED_OPERATION, ""
    if not request.data_set:
        return Status.CANNOT_UNDERSTAND, "no data set follows"
    if not UID.fullmatch(request.sop) or not UID.fullmatch(request.sop_class):
        return Status.CANNOT_UNDERSTAND, "no valid UID in the command"
    if request.sop_class not in STORAGE:
        return Status.SOP_CLASS_NOT_SUPPORTED, ""
    return None


def _failure(error: OSError) -> tuple[Status, str]:
    if error.errno == errno.EFBIG:
        return Status.OUT_OF_RESOURCES, "the object is larger than any that is taken"
    if error.errno in NO_ROOM:
        return Status.OUT_OF_RESOURCES, "no space left"
    return Status.PROCESSING_FAILURE, "the object cannot be written"


def _unexpected(kind: int) -> ProtocolError:
    known = kind in set(Kind)
    return ProtocolError(
        f"a unit of type {kind} where none may be",
        AbortReason.UNEXPECTED_PDU if known else AbortReason.UNRECOGNIZED_PDU,
    )

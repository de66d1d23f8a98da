"""Messages as the control channel carries them: two frames, the session's token and a msgpack struct of messages.py.

Decoding is typed and nothing else: the types bound how deep a message nests, msgpack's lengths are checked against the
bytes that are there, and whatever is not a message is one ProtocolError. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import hmac

import msgspec

from .errors import Failure, ProtocolError
from .messages import Abort, AnyMessage, Failed

MAX_MESSAGE_BYTES = 64 << 20  # what a trainer lends of a very large model comes near a third of it
MAX_FAILURE_CHARS = 4000  # of each string of a Failure: errors are shown, logged and sent on to every rank
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def pack(message: AnyMessage, token: str) -> list[bytes]:
    """The frames of `message`."""
    return [token.encode(), _encoder.encode(message)]


def unpack(frames: list[bytes], token: str) -> AnyMessage:
    """The message in `frames`. Raises ProtocolError, without showing contents, if it is not one of this session."""
    if len(frames) != 2 or not hmac.compare_digest(frames[0], token.encode()):
        raise ProtocolError("a message without this session's token")
    if len(frames[1]) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(frames[1]):,} bytes; {MAX_MESSAGE_BYTES:,} is the most")
    try:
        message = _decoder.decode(frames[1])
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"a message that does not decode: {error}") from None
    except (UnicodeDecodeError, RecursionError, MemoryError) as error:
        # Text that is not UTF-8; a field that we do not know, nested without end; more objects than there is memory.
        raise ProtocolError(f"a message that does not decode: {type(error).__name__}") from None
    if isinstance(message, Failed | Abort):
        return msgspec.structs.replace(message, failure=_shortened(message.failure))
    return message


def _shortened(failure: Failure) -> Failure:
    texts = {field.name: getattr(failure, field.name) for field in dataclasses.fields(failure)}
    long = {name: text for name, text in texts.items() if text is not None and len(text) > MAX_FAILURE_CHARS}
    return dataclasses.replace(failure, **{name: f"{text[:MAX_FAILURE_CHARS]}..." for name, text in long.items()})

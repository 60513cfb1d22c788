"""OpenAI's realtime events, as a caller speaks them: JSON, one event a message.

Both speak at once, as Moshi does: nobody commits audio or asks for an answer, and there is one response, which begins
with the first frame and ends with the dialogue.

Source of names and fields: the types of the ``openai`` package (``openai.types.realtime``).
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import secrets
from concurrent.futures import Future
from typing import Any

from aiohttp import WSCloseCode, WSMsgType

from .codecs import Pcm16
from .dialect import Answer, Audio, Ending, Message, Order
from .engine import NOTHING, Said
from .personas import Busy, Persona, Personas
from .words import Words

TURNS = "both speak at once here: there are no turns to be taken, and nothing but audio is heard"
FOREIGN = (
    "input_audio_buffer.commit",
    "response.create",
    "response.cancel",
    "conversation.item.create",
    "conversation.item.delete",
    "conversation.item.retrieve",
    "conversation.item.truncate",
    "output_audio_buffer.clear",
)
"""Events of clients that are about turns, or about something else than audio."""

CLIENT_ID_LENGTH = 512
"""Most characters of an event's id that errors repeat."""


class NotDone(ValueError):
    """Why an event of a client is not carried out.

    Attributes:
        code: for programs.
        param: the field that is wrong, if it is one.
    """

    def __init__(self, words: str, code: str, param: str | None = None):
        super().__init__(words)
        self.code, self.param = code, param


class Realtime:
    """The events of one caller.

    Args:
        model: its name.
        rate: samples a second.
        tokenizer: of the model.
        personas: that there are, if any.
        persona: that the dialogue begins with.
    """

    message_type = WSMsgType.TEXT

    def __init__(
        self,
        model: str,
        rate: int,
        tokenizer: Any,
        personas: Personas | None = None,
        persona: Persona | None = None,
    ):
        self._rate, self._personas = rate, personas
        self._heard = False
        self._codec, self._words = Pcm16(rate), Words(tokenizer)
        self._numbers = itertools.count(1)
        self._response, self._item = _new_id("resp"), _new_id("item")
        self._place = {
            "response_id": self._response,
            "item_id": self._item,
            "output_index": 0,
            "content_index": 0,
        }
        self._said: list[str] = []
        self._began = False
        sound = {"type": "audio/pcm", "rate": rate}
        self._session: dict[str, Any] = {
            "type": "realtime",
            "object": "realtime.session",
            "id": _new_id("sess"),
            "model": model,
            "output_modalities": ["audio"],
            "instructions": "" if persona is None else persona.text,
            "tools": [],
            "tool_choice": "auto",
            "max_output_tokens": "inf",
            "tracing": None,
            "audio": {
                "input": {"format": sound, "turn_detection": None, "noise_reduction": None, "transcription": None},
                "output": {"format": sound, "voice": persona and persona.voice, "speed": 1.0},
            },
        }

    # ---------------------------------------------------------------------------------------- what is heard

    def read(self, data: str) -> Audio | Answer:
        """As :class:`Dialect`; what an event asks for in vain is answered by an error."""
        event: Any = None
        try:
            try:
                event = json.loads(data, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as problem:
                raise NotDone("a message must be one event in JSON", "invalid_json") from problem
            return self._carry_out(event)
        except NotDone as refusal:
            return Answer((self._error(str(refusal), "invalid_request_error", refusal.code, refusal.param, event),))

    def _carry_out(self, event: Any) -> Audio | Answer:
        kind = event.get("type") if isinstance(event, dict) else None
        if kind == "input_audio_buffer.append":
            self._heard = True
            try:
                return Audio(self._codec.decode(base64.b64decode(event["audio"], validate=True)))
            except (KeyError, TypeError, ValueError, binascii.Error) as problem:
                words = "`audio` must be 16-bit samples in base64; nothing of it was heard"
                raise NotDone(words, "invalid_value", "audio") from problem
        if kind == "input_audio_buffer.clear":
            self._codec = Pcm16(self._rate)
            return Answer((self._event("input_audio_buffer.cleared"),), Order.FORGET)
        if kind == "session.update":
            prompt = self._update_session(event.get("session"))
            updated = self._event("session.updated", session=self._session)
            return Answer((updated,), None if prompt is None else Order.RESTART, prompt)
        if kind in FOREIGN:
            raise NotDone(TURNS, "unsupported_event", "type")
        raise NotDone("`type` must be the name of an event that clients send", "unknown_event", "type")

    def _update_session(self, given: Any) -> Future | None:
        """Carry out a wish for another session: of another persona, before there was audio. What it begins from then.

        Raises:
            NotDone: something is wished for that is not the case and cannot be chosen; then nothing changes.
        """
        if not isinstance(given, dict) or given.get("type") != "realtime":
            raise NotDone("`session.type` must be realtime", "invalid_value", "session.type")
        output = self._session["audio"]["output"]
        had = (self._session["instructions"], output["voice"])
        wished = (given.get("instructions", had[0]), _at(given, "audio", "output").get("voice", had[1]))
        if wished == had or self._personas is None or self._heard or "dialogue" not in self._session:
            _compare("session", given, self._session)
            return None
        text, voice = wished
        if not isinstance(text, str):
            raise NotDone("`session.instructions` must be text", "invalid_value", "session.instructions")
        if not isinstance(voice, str | None):
            raise NotDone("`session.audio.output.voice` must be a name", "invalid_value", "session.audio.output.voice")
        sound = {**self._session["audio"], "output": {**output, "voice": voice}}
        session = {**self._session, "instructions": text, "audio": sound}
        _compare("session", given, session)
        try:
            persona = self._personas.find(voice, text)
            prompt = NOTHING if persona is None else self._personas.state(persona)
        except ValueError as error:
            field = "instructions" if voice == had[1] else "audio.output.voice"
            raise NotDone(str(error), "invalid_value", f"session.{field}") from error
        except Busy as error:
            raise NotDone(str(error), "not_now", "session") from error
        self._session = session
        return prompt

    # ----------------------------------------------------------------------------------------- what is said

    def queued(self, position: int) -> list[Message]:
        """As :class:`Dialect`: an event of our own, before ``session.created``."""
        return [self._event("queue.position", position=position)]

    def greet(self, about: dict[str, Any]) -> list[Message]:
        """As :class:`Dialect`; what the dialogue is held with is the session's ``dialogue``."""
        self._session["dialogue"] = about
        return [self._event("session.created", session=self._session)]

    def say(self, said: Said) -> list[Message]:
        """As :class:`Dialect`; the response begins with the first frame."""
        messages = [] if self._began else self._begin()
        self._began = True
        sound = base64.b64encode(self._codec.encode(said.audio)).decode()
        messages.append(self._event("response.output_audio.delta", **self._place, delta=sound))
        if words := self._words.put(said.text_id):
            self._said.append(words)
            messages.append(self._event("response.output_audio_transcript.delta", **self._place, delta=words))
        return messages

    def object(self, words: str) -> list[Message]:
        """As :class:`Dialect`."""
        return [self._error(words, "invalid_request_error", "not_now")]

    def end(self, ending: Ending) -> list[Message]:
        """As :class:`Dialect`; the response ends with the dialogue."""
        messages = self._finish(ending) if self._began else []
        if ending.words is not None and not _is_as_asked_for(ending):
            messages.append(self._error(ending.words, _kind_of_error(ending), ending.reason))
        return messages

    def _begin(self) -> list[Message]:
        item = self._message("in_progress")
        where = {"response_id": self._response, "output_index": 0}
        return [
            self._event("response.created", response=self._describe("in_progress", None, [])),
            self._event("response.output_item.added", **where, item=item),
            self._event("conversation.item.added", previous_item_id=None, item=item),
            self._event("response.content_part.added", **self._place, part={"type": "audio", "transcript": ""}),
        ]

    def _finish(self, ending: Ending) -> list[Message]:
        failed = ending.reason in ("failed", "malformed")
        status = "failed" if failed else "incomplete"
        details: dict[str, Any] = {"type": status}
        if failed:
            details["error"] = {"type": _kind_of_error(ending), "code": ending.reason}
        elif _is_as_asked_for(ending):
            details["reason"] = "max_output_tokens"
        transcript = "".join(self._said)
        item = self._message("incomplete", {"type": "output_audio", "transcript": transcript})
        where = {"response_id": self._response, "output_index": 0}
        part = {"type": "audio", "transcript": transcript}
        return [
            self._event("response.output_audio.done", **self._place),
            self._event("response.output_audio_transcript.done", **self._place, transcript=transcript),
            self._event("response.content_part.done", **self._place, part=part),
            self._event("conversation.item.done", previous_item_id=None, item=item),
            self._event("response.output_item.done", **where, item=item),
            self._event("response.done", response=self._describe(status, details, [item])),
        ]

    def _describe(self, status: str, details: dict[str, Any] | None, output: list[Any]) -> dict[str, Any]:
        """The response."""
        sound = self._session["audio"]["output"]
        return {
            "id": self._response,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": output,
            "output_modalities": ["audio"],
            "max_output_tokens": "inf",
            "audio": {"output": {"format": sound["format"], "voice": sound["voice"]}},
        }

    def _message(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        """All that Moshi says is one message of the conversation."""
        return {
            "id": self._item,
            "object": "realtime.item",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": list(content),
        }

    def _error(self, words: str, kind: str, code: str, param: str | None = None, cause: Any = None) -> Message:
        given = cause.get("event_id") if isinstance(cause, dict) else None
        event_id = given if isinstance(given, str) and len(given) <= CLIENT_ID_LENGTH else None
        fields = {"type": kind, "code": code, "message": words, "param": param, "event_id": event_id}
        return self._event("error", error={name: _whole_characters(value) for name, value in fields.items()})

    def _event(self, kind: str, **fields: Any) -> str:
        return json.dumps({"type": kind, "event_id": f"event_{next(self._numbers)}", **fields})


def _is_as_asked_for(ending: Ending) -> bool:
    """Whether ``max_steps`` have been reached: no error."""
    return ending.code == WSCloseCode.OK


def _kind_of_error(ending: Ending) -> str:
    return "server_error" if ending.reason in ("failed", "shutdown") else "invalid_request_error"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _whole_characters(text: str | None) -> str | None:
    """A client's words may have halves of characters, which not every reader of JSON takes."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _compare(path: str, given: Any, have: Any) -> None:
    """Raises :class:`NotDone` where the one is not the other; a given dict may have fewer names."""
    if isinstance(given, dict) and isinstance(have, dict):
        for name, value in given.items():
            if name not in have:
                raise NotDone(f"`{path}.{name:.80}` cannot be chosen here", "invalid_value", f"{path}.{name:.80}")
            _compare(f"{path}.{name}", value, have[name])
    elif given != have or isinstance(given, bool) != isinstance(have, bool):
        raise NotDone(f"`{path}` can only be {json.dumps(have)} here", "invalid_value", path)


def _at(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    """What stands there, if it is a dict; else nothing."""
    for name in names:
        found = tree.get(name)
        tree = found if isinstance(found, dict) else {}
    return tree


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"

"""`deploy chat`: a conversation with an adapter in the terminal, or one answer for a script."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tinyllama_lab.core.dataset.chat_template import Message
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.deploy.assistant import Assistant
from tinyllama_lab.deploy.selection import Selection, same_study
from tinyllama_lab.errors import LabError, printable

_COMMANDS = """\
/adapter r=16 n=3000   answer with another adapter of the study: settings, a name or a key
/base                  answer with the model before training
/compare               answer every question twice: base and adapter
/system TEXT           set the system turn; without a text, leave it out
/reset                 begin a new conversation
/help, /quit           show these lines; leave"""


@dataclass
class Style:
    """How answers are generated."""

    tokens: int
    temperature: float
    seed: int

    @property
    def sampling(self) -> TokenSampling | None:
        """Return how tokens are drawn; None is greedy."""
        return TokenSampling(self.temperature, self.seed) if self.temperature else None


class Chat:
    """A conversation whose answers come from an adapter, from the base, or from both."""

    def __init__(self, selection: Selection, assistant: Assistant, style: Style) -> None:
        self._selection, self._assistant, self._style = selection, assistant, style
        self._memory = PeakMemory(assistant.base.device)
        self._adapter: str | None = selection.label
        self._compares = False
        self._system = ""
        # by label: who reads the answers of another one imitates them
        self._turns: dict[str | None, list[Message]] = {}

    def set_system(self, text: str) -> None:
        """Set the system turn; an empty text leaves it out."""
        self._system = text

    def answer(self, question: str) -> None:
        """Print the answer to a question as it is generated, and what it took.

        Raises:
            LabError: the conversation does not fit the model; it stays as it was.
        """
        system = [{"role": "system", "content": self._system}] if self._system else []
        both = [None, self._adapter or self._selection.label]
        turns = dict(self._turns)
        for label in both if self._compares else [self._adapter]:
            if self._compares:
                print(f"[{label or 'base'}]", flush=True)
            asked = [*turns.get(label, []), {"role": "user", "content": question}]
            answer = self._stream(label, [*system, *asked])
            turns[label] = [*asked, {"role": "assistant", "content": answer}]
        self._turns = turns

    def _stream(self, label: str | None, messages: list[Message]) -> str:
        """Print an answer piece by piece, and return it."""
        assistant, started = self._assistant, time.perf_counter()
        request = assistant.request(label, messages, self._style.tokens, self._style.sampling)
        completion, text = assistant.begin(request), assistant.text_stream()
        first, pieces = 0.0, []
        for token in assistant.tokens(completion):
            first = first or time.perf_counter()
            pieces.append(text.push(token))
            print(printable(pieces[-1]), end="", flush=True)
        pieces.append(text.end())
        print(printable(pieces[-1]), flush=True)
        first_s = (first or time.perf_counter()) - started
        self._print_speed(label, len(completion.ids), first_s, started)
        most = self._style.tokens
        if completion.reason == "length" and len(completion.ids) == most:
            print(f"(cut at tokens={most}; for more: tokens={2 * most})", file=sys.stderr)
        return "".join(pieces).strip()

    def _print_speed(self, label: str | None, tokens: int, first_s: float, started: float) -> None:
        """Print what an answer took to standard error, which scripts do not read."""
        rest_s = max(time.perf_counter() - started - first_s, 1e-9)
        speed = f"{(tokens - 1) / rest_s:.0f} tokens/s, " if tokens > 1 else ""
        peak = next(iter(self._memory.read("infer").values()))
        name = f"{label or 'base'}: " if self._compares else ""
        first = f"first after {1000 * first_s:.0f} ms"
        print(f"({name}{tokens} tokens, {speed}{first}, {peak:,.0f} MiB)", file=sys.stderr)

    def loop(self) -> None:
        """Answer lines of standard input until its end, or until `/quit`."""
        print("Type a question, or /help. Ctrl-D leaves.", file=sys.stderr)
        while (line := _read_line(self._adapter or "base")) is not None and line != "/quit":
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self.answer(line)
            except LabError as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)
            except KeyboardInterrupt:  # ends the answer, not the chat
                print("\n(stopped)", file=sys.stderr)

    def _command(self, line: str) -> None:
        """Carry out a line that begins with a slash.

        Raises:
            LabError: no trial, or several, have the settings that were typed.
        """
        word, _, rest = line.partition(" ")
        if word == "/adapter" and rest.strip():
            selection = same_study(self._selection, rest)
            self._assistant.add(selection)
            self._switch(selection.label, f"{selection.label} ({selection.why})")
        elif word == "/base":
            self._switch(None, "the model before training")
        elif word == "/compare":
            self._compares, self._turns = not self._compares, {}
            state = "base and adapter answer" if self._compares else "one answer again"
            print(f"a new conversation: {state}", file=sys.stderr)
        elif word == "/system":
            self.set_system(rest.strip())
        elif word == "/reset":
            self._turns = {}
        else:
            print(_COMMANDS, file=sys.stderr)

    def _switch(self, label: str | None, words: str) -> None:
        """Begin a new conversation with another model."""
        self._adapter, self._compares, self._turns = label, False, {}
        print(f"a new conversation: answers come from {words}", file=sys.stderr)


def _read_line(name: str) -> str | None:
    """Return a typed line, or None at the end of standard input."""
    try:
        return input(f"{name}> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None

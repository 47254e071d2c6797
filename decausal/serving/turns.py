"""The rows that wait for an engine, and whose turn it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from decausal.serving.answer import Answer, AnswerRow


class Turns:
    """Clients take turns, and so do the requests of each client, so nobody waits for all rows of another."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[Answer, deque[AnswerRow]]] = {}  # whose turn it is comes first

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __len__(self) -> int:
        return sum(len(rows) for answers in self._rows.values() for rows in answers.values())

    def __iter__(self) -> Iterator[AnswerRow]:
        return (row for answers in self._rows.values() for rows in answers.values() for row in rows)

    def add(self, answer: Answer) -> None:
        """Puts all rows of a request at the end of its line."""
        if answer.rows:
            self._rows.setdefault(answer.client, {})[answer] = deque(answer.rows)

    def take(self) -> AnswerRow:
        """Takes out the row whose turn it is. Its client, and its request among the client's, go last."""
        client = next(iter(self._rows))
        answers = self._rows.pop(client)
        answer = next(iter(answers))
        rows = answers.pop(answer)
        row = rows.popleft()
        if rows:
            answers[answer] = rows
        if answers:
            self._rows[client] = answers
        return row

    def drop(self, answer: Answer) -> None:
        """Takes out all rows of a request, if it has any."""
        answers = self._rows.get(answer.client, {})
        answers.pop(answer, None)
        if not answers:
            self._rows.pop(answer.client, None)

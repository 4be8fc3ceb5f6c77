"""Tasks as the store keeps them."""

from __future__ import annotations

import json

from posttrain.prune.columns import Task
from posttrain.types import Message, Prompt


def task_content(task: Task) -> str:
    prompt = task.prompt
    return json.dumps(
        {
            "messages": [message.as_dict() for message in prompt.messages],
            "reference": prompt.reference,
            "domain": prompt.domain,
            "metadata": dict(prompt.metadata),
            "completion": task.completion,
        },
        ensure_ascii=False,
    )


def read_task(task_id: str, content: str) -> Task:
    """Its prompt carries the task's id: two tasks may ask the same and expect different answers."""
    fields = json.loads(content)
    prompt = Prompt(
        prompt_id=task_id,
        messages=tuple(Message(**message) for message in fields["messages"]),
        reference=fields["reference"],
        domain=fields["domain"],
        metadata=fields["metadata"],
    )
    return Task(task_id=task_id, prompt=prompt, completion=fields["completion"])

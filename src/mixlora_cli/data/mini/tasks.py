"""The seen tasks: one row each. Adding one touches the table of its room and nothing else.

Several tasks answer by conventions that conflict under alike pictures, so that one can harm another:
object_naming / object_category / choice_letter, object_presence / statement_truth / caption_matching,
count_digit / count_words / count_kinds, word_reading / first_letter, shape_colour / shape_naming.
"""

from __future__ import annotations

from mixlora_cli.data.mini.task import Task
from mixlora_cli.data.mini.tasks_captions import CAPTION_TASKS
from mixlora_cli.data.mini.tasks_looks import LOOKS_TASKS
from mixlora_cli.data.mini.tasks_objects import OBJECT_TASKS
from mixlora_cli.data.mini.tasks_space import SPACE_TASKS
from mixlora_cli.data.mini.tasks_writing import WRITING_TASKS

SEEN_TASKS: dict[str, Task] = {
    task.name: task for task in (*OBJECT_TASKS, *SPACE_TASKS, *LOOKS_TASKS, *WRITING_TASKS, *CAPTION_TASKS)
}

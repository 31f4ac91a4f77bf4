"""The tasks that can be trained, by name. A new task is a new file in tasks/ and a row here."""

from megalith.task import Task
from megalith.tasks import bert, classify, gpt, ict, retriever, t5, vit

TASK_ROWS: dict[str, Task] = {
    "gpt": gpt.TASK,
    "bert": bert.TASK,
    "t5": t5.TASK,
    "ict": ict.TASK,
    "vit": vit.TASK,
    "classify": classify.TASK,
    "retriever": retriever.TASK,
}

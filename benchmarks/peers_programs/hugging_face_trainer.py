"""Hugging Face's Trainer around the same model."""

import tempfile
import time

import torch
from hugging_face_model import make_gpt2
from protocol import answer, asked_size, peak_bytes, rounds
from transformers import Trainer, TrainerCallback, TrainingArguments

size = asked_size()
model = make_gpt2(size)


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(size.vocab_size, (size.sequence_length,))
        return {"input_ids": tokens, "labels": tokens}


class Rounds(TrainerCallback):
    """Stops after each round of steps to answer and to wait for the next."""

    def __init__(self) -> None:
        self.asked = rounds()
        self.left = 1
        self.count = 0
        self.began = self.busy = 0.0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left:
            return control
        if self.count == 0:
            answer(
                loss=float("nan"),
                num_parameters=sum(p.numel() for p in model.parameters()),
                threads=torch.get_num_threads(),
            )
        else:
            answer(
                seconds=time.perf_counter() - self.began,
                cpu_seconds=time.process_time() - self.busy,
                loss=float("nan"),
                peak=peak_bytes(),
            )
        self.count += 1
        self.left = next(self.asked, 0)
        if not self.left:
            control.should_training_stop = True
        self.began, self.busy = time.perf_counter(), time.process_time()
        return control


with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.batch_size,
            max_steps=100_000,
            learning_rate=1e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Tokens(),
        callbacks=[Rounds()],
    )
    trainer.train()

"""`megalith generate`: continue prompts with a trained model."""

from collections.abc import Sequence

from megalith.command_line import CommandParser
from megalith.terminal import why_no_text


def main(words: Sequence[str]) -> int:
    """Read the flags and continue the prompts; return the exit status."""
    parser = CommandParser(prog="megalith generate", description="Continue prompts with a trained model.")
    parser.add_argument("run", help="run directory (what --save named)")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="[tokens; default 100]")
    parser.add_argument("--temperature", type=float, metavar="X", help="[default 0.8]")
    parser.add_argument("--top-k", type=int, metavar="N", help="only the N likeliest tokens [0: all]")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="only the likeliest tokens that make up X [default 0.95]"
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="[default 1234]")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use [the newest]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(words)
    if options.max_new_tokens < 1:
        raise ValueError(
            f"--max-new-tokens = {options.max_new_tokens}: must be greater than 0. Give a positive number."
        )
    if options.seed < 0:
        raise ValueError(f"--seed = {options.seed}: must be 0 or greater. Give another number.")
    if options.greedy:
        for flag, value in (("temperature", options.temperature), ("top-k", options.top_k), ("top-p", options.top_p)):
            if value is not None:
                raise ValueError(f"--{flag} = {value}: --greedy draws nothing. Leave one of them out.")
    for prompt in options.prompt:
        if why_no_text(prompt) is not None:
            raise ValueError(f"--prompt = {prompt!a}: is no text in UTF-8. Correct it.")
    temperature = 0.8 if options.temperature is None else options.temperature

    from megalith.evaluate.generate import Sampling
    from megalith.trained import talk

    sampling = Sampling(
        temperature=0.0 if options.greedy else temperature,
        top_k=options.top_k or 0,
        top_p=0.95 if options.top_p is None else options.top_p,
        seed=options.seed,
    )
    return talk(
        options.run,
        options.prompt,
        sampling,
        max_new_tokens=options.max_new_tokens,
        step=options.step,
        device=options.device,
    )

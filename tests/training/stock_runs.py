"""A plain finetrainers program, as its own train.py; the only line of ours is register().

It is given a JSON list of command lines, makes each run and prints what each came to as JSON in its last line.
"""

import json
import os
import sys

from framebridge_plugin import register

register()

from finetrainers import BaseArgs, SFTTrainer  # noqa: E402
from finetrainers.config import _get_model_specifiction_cls  # noqa: E402
from finetrainers.trainer.sft_trainer import SFTFullRankConfig, SFTLowRankConfig  # noqa: E402


def run(argv: list[str]) -> dict:
    sys.argv = ["train.py", *argv]
    args = BaseArgs()
    args.register_args(SFTLowRankConfig() if "lora" in argv else SFTFullRankConfig())
    args = args.parse_args()
    specification = _get_model_specifiction_cls(args.model_name, args.training_type)(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        text_encoder_dtype=args.text_encoder_dtype,
        transformer_dtype=args.transformer_dtype,
        vae_dtype=args.vae_dtype,
    )
    trainer = SFTTrainer(args, specification)
    world_size = trainer.state.parallel_backend.world_size
    trainer.run()
    return {
        "specification": type(specification).__name__,
        "world_size": world_size,
        "losses": trainer.state.train_state.global_avg_losses,
        "launch_variables": sorted({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)),
    }


if __name__ == "__main__":
    print(json.dumps([run(argv) for argv in json.loads(sys.argv[1])]))

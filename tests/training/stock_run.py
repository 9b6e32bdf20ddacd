"""A plain finetrainers program, as its own train.py: the only line of ours is register()."""

import sys

from framebridge_plugin import register

register()

from finetrainers import BaseArgs, SFTTrainer  # noqa: E402
from finetrainers.config import _get_model_specifiction_cls  # noqa: E402
from finetrainers.trainer.sft_trainer import SFTFullRankConfig, SFTLowRankConfig  # noqa: E402


def main() -> None:
    args = BaseArgs()
    args.register_args(SFTLowRankConfig() if "lora" in sys.argv else SFTFullRankConfig())
    args = args.parse_args()
    specification = _get_model_specifiction_cls(args.model_name, args.training_type)(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        text_encoder_dtype=args.text_encoder_dtype,
        transformer_dtype=args.transformer_dtype,
        vae_dtype=args.vae_dtype,
    )
    SFTTrainer(args, specification).run()


if __name__ == "__main__":
    main()

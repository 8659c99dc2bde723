#!/usr/bin/env bash
# Figure 1 with a pretrained model: texts, tokens, SmolLM2-135M converted and not trained yet, and `reproduce
# pretrained`, all in WORK.
#
#     runs/pretrained.sh WORK BOOKS [OPTION ...]     # BOOKS holds train-00.parquet and val.parquet
#
# OPTIONs go to `ttt-e2e reproduce pretrained`, such as --seeds 0,1 or --tokens 5M. It needs the extras `smollm2` and
# `parquet`. Run it again after whatever interrupted it, and it continues.
set -euo pipefail

work=${1:?usage: runs/pretrained.sh WORK BOOKS [OPTION ...]}
books=${2:?usage: runs/pretrained.sh WORK BOOKS [OPTION ...]}
shift 2
runs=$(cd "$(dirname "$0")" && pwd)
[ -e "$work/texts" ] || { python "$runs/pretrained_texts.py" "$books" "$work/texts.part" && mv "$work/texts.part" "$work/texts"; }
ttt-e2e prepare "$work/texts/train" --val "$work/texts/val" --tokenizer smollm2 --out "$work/tokens"
base=$(python -c 'from ttt_e2e.convert.smollm2 import installed_base; print(installed_base())')
[ -e "$work/start" ] || ttt-e2e convert from-gguf "$base" "$work/start" --window 512
ttt-e2e reproduce pretrained --from "$work/start" --data "$work/tokens" --out "$work/pretrained" "$@"

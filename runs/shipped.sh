#!/usr/bin/env bash
# Train the model that ships in the package (src/ttt_e2e/shipped/MODEL_CARD.md has what came out).
#
#     runs/shipped.sh WORK BOOKS           # BOOKS holds train-00.parquet, train-01.parquet, val.parquet
#     SHRINK=1 runs/shipped.sh WORK        # a toy: every stage for two steps, on a few of Python's modules
#
# Nine stages, 8 h 31 min on two Intel Xeon cores (AVX-512, bfloat16 matrix units). Everything is written to WORK. The
# script is resumable: run it again after whatever interrupted it, and it continues with the stage that is not done.
#
# A stage is planned for more steps than it takes: the learning rate follows the plan, and the stage ends where the table
# of the model card says, with SIGTERM after the checkpoint of that step. It needs Python 3.11 for the same library.
set -euo pipefail

work=${1:?usage: runs/shipped.sh WORK BOOKS}
runs=$(cd "$(dirname "$0")" && pwd)
shrink=${SHRINK:-}
[ -n "$shrink" ] || books=$(cd "${2:?usage: runs/shipped.sh WORK BOOKS}" && pwd)
mkdir -p "$work"
cd "$work"

# tcmalloc, where it is installed, is faster at the many sizes of tensors; the original run had it from stage 5 on.
malloc=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4
[ ! -e "$malloc" ] || export LD_PRELOAD=$malloc

shape=(hidden_size=256 num_attention_heads=4 intermediate_size=704 sliding_window=256 post_norm=false)
plan=(dtype=bfloat16 activation_checkpointing=none keep_checkpoints=3)
compile=(--compile)
if [ -n "$shrink" ]; then
    shape=(hidden_size=32 num_attention_heads=2 intermediate_size=48 sliding_window=256 post_norm=false vocab_size=512)
    plan+=(eval_every=0)
    compile=()
fi

# stage NAME STEP EVERY PROCESSES OPTIONS...: train with OPTIONS until the checkpoint of STEP, one of every EVERY, is there.
stage() {
    local name=$1 step=$2 every=$3 processes=$4 checkpoint small=() resume=() run
    shift 4
    if [ -n "$shrink" ]; then
        step=2 every=2 processes=1
        small=(context=256 batch=1)
    fi
    checkpoint=$(printf '%s/checkpoints/step-%08d' "$name" "$step")
    [ ! -d "$checkpoint" ] || return 0
    echo "== $name, to step $step"
    [ ! -e "$name/config.json" ] || resume=(--resume)
    if [ "$processes" = 1 ]; then
        run=(python -m ttt_e2e train tiny --threads 2)
    else
        run=(torchrun --nproc-per-node "$processes" -m ttt_e2e train tiny --threads 1)
    fi
    "${run[@]}" --data tokens --out "$name" "${compile[@]}" "${resume[@]}" "${shape[@]}" "${plan[@]}" \
        "checkpoint_every=$every" "$@" "${small[@]}" &
    local trainer=$!
    until [ -d "$checkpoint" ]; do
        if ! kill -0 "$trainer" 2> /dev/null; then
            wait "$trainer" || true
            [ -d "$checkpoint" ] || { echo "$name ended before step $step" >&2; exit 1; }
        fi
        sleep 1
    done
    kill -TERM "$trainer" 2> /dev/null || true
    wait "$trainer" || true
}

checkpoint() { # NAME STEP
    printf '%s/checkpoints/step-%08d' "$1" "$([ -n "$shrink" ] && echo 2 || echo "$2")"
}

if [ ! -d stdlib ]; then
    rm -rf stdlib.part && mkdir stdlib.part
    SHRINK=$shrink python - << 'EOF'
import os
from pathlib import Path

from ttt_e2e.data.text import standard_library

few = {"json", "email", "html"} if os.environ["SHRINK"] else None
for document in standard_library():
    if document.name != "asyncio" and (few is None or document.name in few):
        (Path("stdlib.part") / f"{document.name}.py").write_text(document.text)
EOF
    mv stdlib.part stdlib
fi
if [ -n "$shrink" ]; then
    python -m ttt_e2e prepare stdlib --vocab-size 512 --val stdlib/html.py --out tokens --quiet
else
    python -m ttt_e2e prepare "$books/train-00.parquet" "$books/train-01.parquet" stdlib --vocab-size 4096 \
        --val "$books/val.parquet" --out tokens
fi

stage stage1 4028 212 2 mini_batch_size=64 context=1024 batch=4 steps=16000 lr=2e-3 lr_end=5e-4 warmup_steps=400 \
    inner_warmup_steps=400
plan+=(inner_warmup_steps=0)
stage stage2 599 599 2 mini_batch_size=64 context=2048 batch=2 steps=12000 lr=1.8e-3 lr_end=6e-4 warmup_steps=100 \
    seed=1 --from "$(checkpoint stage1 4028)"
stage stage3 725 145 2 mini_batch_size=32 context=2048 batch=8 steps=2400 lr=2.5e-3 lr_end=8e-4 warmup_steps=40 seed=2 \
    --from "$(checkpoint stage2 599)"
stage stage4 235 47 2 mini_batch_size=32 context=4096 batch=8 steps=1200 lr=2.2e-3 lr_end=6e-4 warmup_steps=20 seed=4 \
    --from "$(checkpoint stage3 725)"
plan+=(mini_batch_size=16 inner_loop.lr=0.75)
stage stage5 184 46 2 context=4096 batch=4 steps=1200 lr=1.8e-3 lr_end=6e-4 warmup_steps=20 seed=5 \
    --from "$(checkpoint stage4 235)"
stage stage6 229 229 2 context=4096 batch=6 steps=800 lr=1.8e-3 lr_end=6e-4 warmup_steps=20 seed=6 \
    --from "$(checkpoint stage5 184)"
stage stage7 40 20 2 context=8192 batch=2 steps=270 lr=1.3e-3 lr_end=3e-4 warmup_steps=8 seed=7 \
    --from "$(checkpoint stage6 229)"
stage stage8 221 17 1 context=16384 batch=1 steps=400 lr=1.3e-3 lr_end=1e-3 warmup_steps=8 seed=9 \
    --from "$(checkpoint stage7 40)"
[ -d wide ] || python "$runs/widen.py" "$(checkpoint stage8 221)" wide
shape+=("fast_intermediate_size=$([ -n "$shrink" ] && echo 96 || echo 1408)")
stage stage9 60 20 1 context=16384 batch=1 steps=400 lr=1.3e-3 lr_end=1e-3 warmup_steps=8 seed=10 --from wide

if [ ! -d shipped ]; then
    python - "$(checkpoint stage9 60)" << 'EOF'
import sys
from pathlib import Path

import torch

from ttt_e2e.model.checkpoint import load_transformer, save_model

folder = Path(sys.argv[1])
notes = {"data": "public-domain English books and Python's standard library", "card": "MODEL_CARD.md"}
save_model(load_transformer(folder), Path("shipped"), folder / "tokenizer.json", torch.bfloat16, notes)
EOF
fi
echo "== $work/shipped"

#!/usr/bin/env bash
# Runs the commands that the documentation shows, in order, and fails if one does. Minutes to an hour: for a release.
#   tests/hardware/doc_commands.sh OUT [--page docs/tensorrt.md]… [--gpu]
# OUT gets log.txt, and in OUT/tree what the commands write. What needs a GPU is left out without --gpu; what needs the
# 6 B checkpoint always is. tests/docs/test_doc_commands.py checks in CI that all of them parse.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
exec "$python" "$root/tests/helpers/doc_commands.py" "$@"

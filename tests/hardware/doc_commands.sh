#!/usr/bin/env bash
# Runs the commands of the documentation in order, and fails if one fails. Takes minutes to an hour; for a release.
#   tests/hardware/doc_commands.sh OUT [--page docs/tensorrt.md]… [--gpu]
# OUT gets log.txt, and OUT/tree the outputs of the commands. Without --gpu, commands that need a GPU are skipped; those
# that need the 6 B checkpoint always are. In CI, tests/docs/test_doc_commands.py checks that all of them parse.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
exec "$python" "$root/tests/helpers/doc_commands.py" "$@"

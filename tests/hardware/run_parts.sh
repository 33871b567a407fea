# For scripts that run parts on a GPU machine and go on after one that fails; they set `out` to the folder of logs.

failed=()

# run NAME COMMAND...: logs the command to NAME.log and prints its last lines.
run() {
  local name=$1
  shift
  echo "== $name: $*"
  local start=$SECONDS
  "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
  local status=${PIPESTATUS[0]}
  echo "== $name: exit status $status after $((SECONDS - start)) s"
  [[ $status -eq 0 ]] || failed+=("$name")
}

# Exits with 1 and their names if parts failed.
end_parts() {
  if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
  fi
}

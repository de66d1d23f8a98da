# For gpu_all.sh and multi_gpu_all.sh, which source it.
end_processes() { # of one case, by the mark in their environment: an engine may outlive the process that started it
  local file pid
  for file in /proc/[0-9]*/environ; do
    pid=${file#/proc/} pid=${pid%/environ}
    if [ "$pid" != $$ ] && [ "$pid" != "$BASHPID" ] && grep -qz "^MBRIDGE_BENCH_CASE=$1\$" "$file" 2>/dev/null; then
      kill -9 "$pid" 2>/dev/null
    fi
  done
}

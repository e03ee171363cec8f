# Runs nvcc. That ptxas puts wgmma instructions one after the other (C7510 to C7514) is a mere remark of it, which
# --warning-as-error lets pass; they then run at half their speed. Here it is an error.
output=$("$@" 2>&1)
status=$?
printf '%s\n' "$output" | sed '/^$/d' >&2
case $output in
  *"wgmma.mma_async instructions are serialized"*) exit 1 ;;
esac
exit $status

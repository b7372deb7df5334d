# Tab completion of `nemo llm` for nemo-align @VERSION@. Written by `nemo llm completion`; run it again after an upgrade.
_nemo_align() {
  local line=${COMP_LINE:0:$COMP_POINT} typed now before command word rest last='' factories='' words='' offered=''
  now=${line##*[[:space:]]}
  typed=${line%"$now"}
  read -r _ word command _ <<<"$typed"
  before=${typed%"${typed##*[![:space:]]}"}
  before=${before##*[[:space:]]}
  COMPREPLY=()
  if [[ -z $word ]]; then
    offered='llm experiment devspace'
  elif [[ $word != llm ]]; then
    return
  elif [[ -z $command ]]; then
    offered='@COMMANDS@ --help'
  else
    case $command in
@CASES@
    esac
    case $before in
      --factory | -f) offered=$factories ;;
      *) if [[ $now == -* ]]; then offered='@OPTIONS@ --help'; else offered=$words; fi ;;
    esac
  fi
  # One level at a time: `trainer.` before `trainer.strategy.`, `loss=` before `loss=ipo`.
  for word in $offered; do
    [[ $word == "$now"* ]] || continue
    rest=${word#"$now"}
    case $rest in
      *[.=]?*)
        before=${rest%%[.=]*}
        rest=$before${rest:${#before}:1}
        ;;
    esac
    [[ $now$rest == "$last" ]] || COMPREPLY+=("$now$rest")
    last=$now$rest
  done
  [[ -z ${ZSH_VERSION:-} ]] || return 0
  # bash breaks words at `=` and inserts the part after it; zsh does not.
  [[ $now != *=* || $COMP_WORDBREAKS != *=* ]] || COMPREPLY=("${COMPREPLY[@]#"${now%=*}="}")
  [[ $last != *[.=] ]] || compopt -o nospace 2>/dev/null
}
if [[ -n ${ZSH_VERSION:-} ]]; then
  complete -o default -o nospace -F _nemo_align nemo
else
  complete -o default -F _nemo_align nemo
fi

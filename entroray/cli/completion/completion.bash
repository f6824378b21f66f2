# bash completion of entroray @version@. For every new shell:
#   mkdir -p ~/.local/share/bash-completion/completions
#   entroray completion bash >~/.local/share/bash-completion/completions/entroray
@cases@
_entroray() {
    local line=${COMP_LINE:0:COMP_POINT} command=${COMP_WORDS[1]} word key="" list flags value before=""
    word=${line##*[[:space:]]}
    flags=$(_entroray_flags "$command")
    if ((COMP_CWORD == 1)); then
        list=$(_entroray_commands)
    elif [[ " $flags " == *" ${COMP_WORDS[COMP_CWORD - 1]}= "* ]]; then
        list=@files
    elif [[ $word == -* && $word != *=* ]]; then
        list=$flags
    elif [[ $word == -* ]]; then
        key=${word%%=*} list=@files
        [[ $key != --cfg ]] || list=job
    elif [[ $word == *=* ]]; then
        key=${word%%=*} list=$(_entroray_values "${key##*[+~]}")
    else
        list=$(_entroray_words "$command")
        [[ $flags != *--config-dir=* ]] || list+=" $(_entroray_values keys)"
    fi
    value=${word#"${key:+$key=}"}
    if [[ $list == *@files* ]]; then
        mapfile -t COMPREPLY < <(compgen -f -- "$value")
        compopt -o filenames 2>/dev/null
    else # the last of several, as a lab takes them
        [[ -z $key ]] || before=${value%"${value##*,}"}
        mapfile -t COMPREPLY < <(compgen -P "$before" -W "$list" -- "${value##*,}")
    fi
    # Readline completes what stands behind the last of COMP_WORDBREAKS, which has `=` unless the user took it out.
    [[ -z $key || $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${COMPREPLY[@]/#/$key=}")
    [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace 2>/dev/null
}
complete -F _entroray entroray

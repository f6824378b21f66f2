#compdef entroray
# zsh completion of entroray @version@. For every new shell, where ~/.zfunc is in $fpath before compinit:
#   entroray completion zsh >~/.zfunc/_entroray
@cases@
_entroray() {
    local command=${words[2]} word=$PREFIX list flags
    flags=$(_entroray_flags $command)
    if ((CURRENT == 2)); then
        list=$(_entroray_commands)
    elif [[ " $flags " == *" ${words[CURRENT - 1]}= "* ]]; then
        list=@files
    elif [[ $word == -*=* ]]; then
        list=@files
        [[ $word != --cfg=* ]] || list=job
    elif [[ $word == -* ]]; then
        list=$flags
    elif [[ $word == *=* ]]; then
        list=$(_entroray_values ${${word%%=*}##*[+~]})
    else
        list=$(_entroray_words $command)
        [[ $flags != *--config-dir=* ]] || list+=" $(_entroray_values keys)"
    fi
    [[ $word != *=* ]] || compset -P 1 '*='
    if [[ $list == *@files* ]]; then
        _files
        return
    fi
    compset -P '*,' # the last of several, as a lab takes them
    local -a open=(${(M)${(z)list}:#*=}) whole=(${${(z)list}:#*=})
    compadd -S '' -a open
    compadd -a whole
}
if [[ $funcstack[1] == _entroray ]]; then _entroray "$@"; else compdef _entroray entroray; fi

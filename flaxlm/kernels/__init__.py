"""How the hot spots are computed: functions of arrays, without model or config."""

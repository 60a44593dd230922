"""Write the templates of the Helm chart: ``python scripts/chart.py``.

The manifests in deploy/kubernetes are the only source. A template is a manifest in which values of
the chart stand in the place of what an administrator may have to change. The chart has no template
of the namespace, because Helm creates it (``--create-namespace``).
"""

import re

from release import ROOT

MANIFESTS = ROOT / "deploy" / "kubernetes"
CHART = ROOT / "deploy" / "helm" / "udptun"
FILES = ("rbac.yaml", "config.yaml", "daemonset.yaml", "monitoring/podmonitor.yaml")
NOTE = "{{- /* scripts/chart.py writes this file from deploy/kubernetes. */ -}}\n"
IMAGE = "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
# as text, because `off` without quotes is the boolean false in YAML
IF_ACCELERATE = '{{- if eq (toString .Values.accelerate) "auto" }}'
CHANGES = {  # pattern -> replacement, and how often it occurs in all files
    r"namespace: kube-udptun$": ("namespace: {{ .Release.Namespace }}", 5),
    r"image: udptun$": (f'image: "{IMAGE}"', 3),
    r"imagePullPolicy: IfNotPresent$": ("imagePullPolicy: {{ .Values.image.pullPolicy }}", 3),
    r"^  net-conf\.json: \|\n(?:    .*\n)+": (
        "  net-conf.json: |\n    {{- .Values.netConf | toPrettyJson | nindent 4 }}\n", 1,
    ),
    r"^( +)kubernetes\.io/os: linux$": (
        r"\g<0>\n\1{{- with .Values.nodeSelector }}\n\1{{- toYaml . | nindent 8 }}\n\1{{- end }}",
        1,
    ),
    r"^( +)- --healthz-port=8286$": (
        r"\g<0>"
        r"\n\1{{- with .Values.metrics.port }}\n\1- --metrics=[$(POD_IP)]:{{ . }}\n\1{{- end }}"
        rf"\n\1{IF_ACCELERATE}\n\1- --accelerate=auto\n\1{{{{- end }}}}"
        r"\n\1{{- range .Values.nodeOptions }}\n\1- {{ . | quote }}\n\1{{- end }}", 1,
    ),
    r"^( +)add: \[NET_ADMIN\]$": (
        rf"\1{IF_ACCELERATE}\n\1add: [NET_ADMIN, BPF]"
        r"\n\1{{- else }}\n\g<0>\n\1{{- end }}", 1,
    ),
    r"^( +)  fieldRef:\n +fieldPath: spec\.nodeName$": (
        r"\g<0>\n          {{- if .Values.metrics.port }}\n            - name: POD_IP"
        r"\n              valueFrom:\n                fieldRef:"
        r"\n                  fieldPath: status.podIP\n          {{- end }}", 1,
    ),
    r"^    rollingUpdate:\n(?:      .*\n)+": (
        "    {{- toYaml .Values.updateStrategy | nindent 4 }}\n", 1,
    ),
    r"^      serviceAccountName: udptun$": (
        r"\g<0>\n      {{- with .Values.imagePullSecrets }}\n      imagePullSecrets:"
        r"\n        {{- toYaml . | nindent 8 }}\n      {{- end }}", 1,
    ),
    r"^      hostNetwork: true$": (
        r"\g<0>\n      {{- if .Values.hostPID }}\n      hostPID: true\n      {{- end }}", 1,
    ),
    r"^      labels:\n        app\.kubernetes\.io/name: udptun\n    spec:$": (
        r"      {{- with .Values.podAnnotations }}\n      annotations:"
        r"\n        {{- toYaml . | nindent 8 }}\n      {{- end }}\n\g<0>", 1,
    ),
    r"^            requests:\n              cpu: 100m\n.*\n": (
        "            {{- toYaml .Values.resources.forwarder | nindent 12 }}\n", 1,
    ),
    r"^            requests:\n              cpu: 50m\n.*\n": (
        "            {{- toYaml .Values.resources.node | nindent 12 }}\n", 1,
    ),
    r"^( +)- name: NODE_NAME$": (
        r"\1{{- with .Values.env }}\n\1{{- toYaml . | nindent 12 }}\n\1{{- end }}\n\g<0>", 1,
    ),
    r"^            path: /opt/cni/bin$": ("            path: {{ .Values.cni.binDir }}", 1),
    r"^            path: /etc/cni/net\.d$": ("            path: {{ .Values.cni.confDir }}", 1),
    r"\b9586\b": ("{{ .Values.metrics.port }}", 2),
    r"(?s)\A(.*^kind: PodMonitor$.*)\Z": (
        "{{- if and .Values.metrics.port .Values.metrics.podMonitor }}\n\\1{{- end }}\n", 1,
    ),
}


def templates() -> dict[str, str]:
    """Return the file name and the text of each template."""
    texts = {name: (MANIFESTS / name).read_text() for name in FILES}
    for pattern, (replacement, wanted) in CHANGES.items():
        found = 0
        for name, text in texts.items():
            texts[name], n = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            found += n
        if found != wanted:
            raise SystemExit(f"{pattern!r} occurs {found} times in deploy/kubernetes, not {wanted}")
    return {name.rpartition("/")[2]: NOTE + text for name, text in texts.items()}


def main() -> None:
    folder = CHART / "templates"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in templates().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()

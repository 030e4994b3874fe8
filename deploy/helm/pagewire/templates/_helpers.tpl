{{- define "pagewire.fullname" -}}
{{- if contains "pagewire" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-pagewire" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "pagewire.selector" -}}
app.kubernetes.io/name: pagewire
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "pagewire.labels" -}}
{{ include "pagewire.selector" . }}
app.kubernetes.io/part-of: pagewire
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{- define "pagewire.image" -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end }}pagewire-{{ .name }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "pagewire.model" -}}
{{ .Values.model | default "/models/pagewire-demo" }}
{{- end }}

{{- define "pagewire.redisUrl" -}}
{{- if .Values.redis.url }}{{ .Values.redis.url }}{{ else }}{{ ternary "redis" "rediss" (eq .Values.tls.mode "none") }}://{{ include "pagewire.fullname" . }}-redis:6379/0{{ end }}
{{- end }}

{{/* Environment that all services of ours share. */}}
{{- define "pagewire.environment" -}}
- name: PAGEWIRE_REDIS_URL
{{- if .root.Values.redis.urlSecret.name }}
  valueFrom: {secretKeyRef: {name: {{ .root.Values.redis.urlSecret.name }}, key: {{ .root.Values.redis.urlSecret.key }}}}
{{- else }}
  value: {{ include "pagewire.redisUrl" .root | quote }}
{{- end }}
{{- if ne .root.Values.tls.mode "none" }}
- {name: PAGEWIRE_TLS_CERT, value: /tls/tls.crt}
- {name: PAGEWIRE_TLS_KEY, value: /tls/tls.key}
- {name: PAGEWIRE_TLS_CA, value: /tls/ca.crt}
{{- end }}
{{- with .root.Values.monitoring.otlpTracesEndpoint }}
- {name: PAGEWIRE_OTLP_TRACES_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- define "pagewire.hubEnvironment" -}}
{{- with .root.Values.hfTokenSecret }}{{ if .name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}{{ end }}
{{- end }}

{{- define "pagewire.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if ne .root.Values.tls.mode "none" }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- end }}

{{/* role: whose certificate. */}}
{{- define "pagewire.volumes" -}}
- {name: tmp, emptyDir: {}}
{{- if ne .root.Values.tls.mode "none" }}
- {name: tls, secret: {secretName: {{ include "pagewire.fullname" .root }}-{{ .role }}-tls, defaultMode: 0440}}
{{- end }}
{{- end }}

{{- define "pagewire.modelVolume" -}}
- name: models
{{- if eq .root.Values.modelCache.type "pvc" }}
  persistentVolumeClaim: {claimName: {{ .root.Values.modelCache.existingClaim | default (printf "%s-models" (include "pagewire.fullname" .root)) }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .root.Values.modelCache.size }}}
{{- end }}
{{- end }}

{{- define "pagewire.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  runAsGroup: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "pagewire.selector" . | nindent 8 }}
{{- end }}

{{- define "pagewire.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Readiness: takes new requests; false while it starts and drains. Liveness: answers at all, however slowly. */}}
{{- define "pagewire.probes" -}}
{{- $tls := ne .root.Values.tls.mode "none" }}
{{- $address := ternary (printf "https://127.0.0.1:%v" .port) (printf "127.0.0.1:%v" .port) (and $tls (eq .service "bridge")) }}
startupProbe:
  exec: {command: [pagewire-health, {{ .service }}, {{ $address | quote }}, --live]}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: {{ .startupFailures }}
readinessProbe:
  exec: {command: [pagewire-health, {{ .service }}, {{ $address | quote }}]}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 2
livenessProbe:
  exec: {command: [pagewire-health, {{ .service }}, {{ $address | quote }}, --live, --timeout=25]}
  periodSeconds: 30
  timeoutSeconds: 30
  failureThreshold: 4
{{- end }}

{{- define "pagewire.podMetadata" -}}
labels: {{ include "pagewire.labels" . | nindent 2 }}
{{- with .root.Values.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .root.Values.podAnnotations }}
annotations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Of a worker: what is given, over what it needs at least. A shell that eats the backslash of nvidia\.com/gpu leaves
     limits.nvidia["com/gpu"]: that is meant, too. */}}
{{- define "pagewire.workerResources" -}}
{{- $given := deepCopy . }}
{{- range $kind := list "limits" "requests" }}
{{- $map := index $given $kind | default dict }}
{{- if kindIs "map" $map.nvidia }}
{{- $_ := set $map "nvidia.com/gpu" (index $map.nvidia "com/gpu") }}
{{- $_ := unset $map "nvidia" }}
{{- end }}
{{- end }}
{{- $least := dict "requests" (dict "cpu" "2" "memory" "4Gi") "limits" (dict "memory" "8Gi") }}
{{- if dig "limits" "nvidia.com/gpu" "" $given }}
{{- $least = dict "requests" (dict "cpu" "8" "memory" "32Gi") "limits" (dict "memory" "64Gi") }}
{{- end }}
{{- mergeOverwrite $least $given | toYaml }}
{{- end }}

"""
A database at version 1, as an earlier program laid it: the same tables as ours, in that program's spelling.

No row is ambiguous, so the upgrade has nothing to repair.
"""

SOON = 4102444800000  # the year 2100

TABLES = (
    "runtime_attempts",
    "runtime_leases",
    "runtime_jobs",
    "runtime_interrupts",
    "runtime_step_reports",
    "runtime_audit_logs",
    "runtime_api_keys",
)

VERSION_1 = """
CREATE TABLE runtime_schema_migrations (
    version {number} CONSTRAINT ledger_pk PRIMARY KEY,
    name TEXT NOT NULL,
    applied_at_ms BIGINT NOT NULL
);
CREATE TABLE runtime_attempts (
    attempt_id TEXT CONSTRAINT attempts_pk PRIMARY KEY,
    run_id TEXT NOT NULL,
    attempt_no INT NOT NULL,
    status TEXT NOT NULL,
    retry_at_ms INT8
);
CREATE TABLE runtime_leases (
    lease_id TEXT NOT NULL,
    attempt_id TEXT NOT NULL,
    worker_id TEXT NOT NULL,
    lease_expires_at_ms INT8 NOT NULL,
    heartbeat_at_ms INT8 NOT NULL,
    version INT8 NOT NULL,
    CONSTRAINT leases_pk PRIMARY KEY (lease_id),
    CONSTRAINT one_lease_each UNIQUE (attempt_id)
);
CREATE TABLE runtime_jobs (
    thread_id TEXT CONSTRAINT jobs_pk PRIMARY KEY,
    status TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    updated_at_ms BIGINT NOT NULL
);
CREATE TABLE runtime_interrupts (
    interrupt_id TEXT NOT NULL PRIMARY KEY,
    thread_id TEXT NOT NULL,
    run_id TEXT NOT NULL,
    attempt_id TEXT NOT NULL,
    value_json TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);
CREATE TABLE runtime_step_reports (
    report_id {auto},
    worker_id TEXT NOT NULL,
    attempt_id TEXT NOT NULL,
    action_id TEXT NOT NULL,
    status TEXT NOT NULL,
    dedupe_token TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    CONSTRAINT reported_once UNIQUE (attempt_id, dedupe_token)
);
CREATE TABLE "runtime_audit_logs" (
    "audit_id" {auto},
    "actor_type" TEXT NOT NULL,
    "actor_id" TEXT,
    "actor_role" TEXT,
    "action" TEXT NOT NULL,
    "resource_type" TEXT NOT NULL,
    "resource_id" TEXT NULL,
    "result" TEXT NOT NULL,
    "request_id" TEXT NOT NULL,
    "details_json" TEXT NULL,
    "created_at_ms" BIGINT NOT NULL
);
CREATE TABLE runtime_api_keys (
    key_id TEXT PRIMARY KEY NOT NULL,
    secret_hash TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    updated_at_ms BIGINT NOT NULL
);
CREATE INDEX idx_runtime_attempts_status_retry ON runtime_attempts (status, retry_at_ms);
CREATE INDEX idx_runtime_leases_expiry ON runtime_leases (lease_expires_at_ms ASC);
CREATE INDEX idx_runtime_interrupts_status ON runtime_interrupts (status);
CREATE INDEX idx_runtime_interrupts_thread ON runtime_interrupts ("thread_id");
CREATE INDEX idx_runtime_jobs_status ON runtime_jobs (status);
CREATE INDEX idx_runtime_step_reports_attempt ON runtime_step_reports (attempt_id, created_at_ms DESC);
CREATE INDEX idx_runtime_audit_logs_created ON runtime_audit_logs (created_at_ms DESC);
CREATE INDEX idx_runtime_audit_logs_request ON runtime_audit_logs (request_id);
CREATE INDEX "idx_runtime_audit_logs_action" ON "runtime_audit_logs" ("action", "created_at_ms" DESC);
CREATE INDEX idx_runtime_api_keys_status ON runtime_api_keys (status);

INSERT INTO runtime_schema_migrations VALUES (1, 'baseline_runtime_tables', 1600000000000);
INSERT INTO runtime_attempts VALUES
    ('backoff', 'run-1', 3, 'retry_backoff', 4102444800000),
    ('cancelled', 'run-1', 1, 'cancelled', NULL),
    ('completed', 'run-1', 2, 'completed', NULL),
    ('delayed', 'run-1', 1, 'queued', 4102444800000),
    ('failed', 'run-2', 9, 'failed', NULL),
    ('leased', 'run-2', 2, 'leased', NULL),
    ('queued', 'run ''2'' 🐎', 1, 'queued', NULL),
    ('running', '', 1, 'running', NULL);
INSERT INTO runtime_leases VALUES
    ('lease-1', 'leased', 'worker-a', 4102444800000, 1600000000000, 7),
    ('lease-2', 'running', 'worker-b', 4102444800001, 1600000000001, 5000000000);
INSERT INTO runtime_jobs VALUES
    ('thread-1', 'active', 1600000000000, 1600000000001),
    ('thread-2', 'done', -1, 0);
INSERT INTO runtime_interrupts VALUES
    ('interrupt-1', 'thread-1', 'run-1', 'leased', '{"ask": ["a \\ b", null]}', 'pending', 1600000000000);
INSERT INTO runtime_step_reports (worker_id, attempt_id, action_id, status, dedupe_token, created_at_ms) VALUES
    ('worker-a', 'leased', 'action-1', 'ok', 'once', 1600000000000),
    ('worker-a', 'leased', 'action-1', 'ok', 'twice', 1600000000001);
INSERT INTO runtime_audit_logs (actor_type, actor_role, action, resource_type, result, request_id, created_at_ms) VALUES
    ('user', 'admin', 'job.create', 'job', 'ok', 'request-1', 1600000000000);
INSERT INTO runtime_audit_logs VALUES
    (5, 'key', 'key-1', 'viewer', 'job.read', 'job', 'thread-1', 'ok', 'request-2', '{"n": 1}', 1600000000000);
INSERT INTO runtime_api_keys VALUES
    ('key-1', 'scrypt$16384$8$1$c2FsdA==$aGFzaA==', 'active', 1600000000000, 1600000000001);
"""

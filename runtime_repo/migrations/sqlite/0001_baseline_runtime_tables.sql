-- The tables that version 1 has always had. Databases at this version exist: never change this file.

create table {schema}.runtime_attempts (
    attempt_id  text not null primary key,
    run_id      text not null,
    attempt_no  integer not null,
    status      text not null,
    retry_at_ms integer
);

create table {schema}.runtime_leases (
    lease_id            text not null primary key,
    attempt_id          text not null unique,
    worker_id           text not null,
    lease_expires_at_ms integer not null,
    heartbeat_at_ms     integer not null,
    version             integer not null
);

create table {schema}.runtime_jobs (
    thread_id     text not null primary key,
    status        text not null,
    created_at_ms integer not null,
    updated_at_ms integer not null
);

create table {schema}.runtime_interrupts (
    interrupt_id  text not null primary key,
    thread_id     text not null,
    run_id        text not null,
    attempt_id    text not null,
    value_json    text not null,
    status        text not null,
    created_at_ms integer not null
);

create table {schema}.runtime_step_reports (
    report_id     integer primary key autoincrement,
    worker_id     text not null,
    attempt_id    text not null,
    action_id     text not null,
    status        text not null,
    dedupe_token  text not null,
    created_at_ms integer not null,
    unique (attempt_id, dedupe_token)
);

create table {schema}.runtime_audit_logs (
    audit_id      integer primary key autoincrement,
    actor_type    text not null,
    actor_id      text,
    actor_role    text,
    action        text not null,
    resource_type text not null,
    resource_id   text,
    result        text not null,
    request_id    text not null,
    details_json  text,
    created_at_ms integer not null
);

create table {schema}.runtime_api_keys (
    key_id        text not null primary key,
    secret_hash   text not null,
    status        text not null,
    created_at_ms integer not null,
    updated_at_ms integer not null
);

create index {schema}.idx_runtime_attempts_status_retry on runtime_attempts (status, retry_at_ms);
create index {schema}.idx_runtime_leases_expiry on runtime_leases (lease_expires_at_ms);
create index {schema}.idx_runtime_interrupts_status on runtime_interrupts (status);
create index {schema}.idx_runtime_interrupts_thread on runtime_interrupts (thread_id);
create index {schema}.idx_runtime_jobs_status on runtime_jobs (status);
create index {schema}.idx_runtime_step_reports_attempt on runtime_step_reports (attempt_id, created_at_ms desc);
create index {schema}.idx_runtime_audit_logs_created on runtime_audit_logs (created_at_ms desc);
create index {schema}.idx_runtime_audit_logs_request on runtime_audit_logs (request_id);
create index {schema}.idx_runtime_audit_logs_action on runtime_audit_logs (action, created_at_ms desc);
create index {schema}.idx_runtime_api_keys_status on runtime_api_keys (status);

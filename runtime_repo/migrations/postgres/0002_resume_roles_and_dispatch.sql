-- Queues, priorities, payloads, results and fencing for attempts; answers for interrupts; roles for API keys.
-- Every NOT NULL column has a constant default: rows stay where they are and the statement stays cheap.

alter table {schema}.runtime_attempts
    add column queue text not null default 'default',
    add column priority integer not null default 0,
    add column payload_json text,
    add column max_attempts integer not null default 10,
    add column lease_version bigint not null default 0,
    add column worker_id text,
    add column enqueued_at_ms bigint not null default 0,
    add column started_at_ms bigint,
    add column finished_at_ms bigint,
    add column result_json text,
    add column error text,
    add column lease_id text,
    add column ended_by text;

alter table {schema}.runtime_leases
    add column claimed_at_ms bigint not null default 0;

alter table {schema}.runtime_step_reports
    add column payload_json text,
    add column lease_version bigint;

alter table {schema}.runtime_interrupts
    add column resume_payload_json text,
    add column resume_payload_hash text,
    add column resumed_at_ms bigint;

alter table {schema}.runtime_api_keys
    add column role text not null default 'operator';

-- One row for each switch of the operator's.
create table {schema}.runtime_control (
    name          text not null primary key,
    value_json    text not null,
    updated_at_ms bigint not null
);

-- It would cost a third of the claims.
drop index if exists {schema}.idx_runtime_attempts_status_retry;

-- What version 1 left ambiguous. Tokens go on from the lease that lives, so that no token is given out twice.
update {schema}.runtime_attempts
   set lease_version = l.version, lease_id = l.lease_id
  from {schema}.runtime_leases as l
 where l.attempt_id = runtime_attempts.attempt_id;

-- A lease on a final or missing attempt owns nothing.
delete from {schema}.runtime_leases
 where not exists (
           select 1 from {schema}.runtime_attempts as a
            where a.attempt_id = runtime_leases.attempt_id and a.status not in ('completed', 'failed', 'cancelled'));

-- Nobody owns it, so nobody would ever finish it.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null
 where status in ('leased', 'running')
   and not exists (select 1 from {schema}.runtime_leases as l where l.attempt_id = runtime_attempts.attempt_id);

-- Without a time it would wait for ever.
update {schema}.runtime_attempts
   set status = 'queued'
 where status = 'retry_backoff'
   and retry_at_ms is null;

-- Whatever was tried more often than the default allows has one try left, as long as that is a number.
update {schema}.runtime_attempts
   set max_attempts = least(attempt_no, 2147483646) + 1
 where attempt_no >= max_attempts;

update {schema}.runtime_attempts
   set finished_at_ms = {now_ms}
 where status in ('completed', 'failed', 'cancelled');

create index idx_runtime_attempts_ready on {schema}.runtime_attempts (queue, priority desc, enqueued_at_ms, attempt_id)
 where status = 'queued' and retry_at_ms is null;
create index idx_runtime_attempts_due on {schema}.runtime_attempts (queue, retry_at_ms, attempt_id)
 where status in ('queued', 'retry_backoff') and retry_at_ms is not null;
create index idx_runtime_attempts_final on {schema}.runtime_attempts (finished_at_ms, attempt_id)
 where finished_at_ms is not null;
create index idx_runtime_attempts_run on {schema}.runtime_attempts (run_id, attempt_id);
create index idx_runtime_attempts_status on {schema}.runtime_attempts (status, attempt_id);
create index idx_runtime_interrupts_attempt on {schema}.runtime_interrupts (attempt_id);
create index idx_runtime_leases_worker on {schema}.runtime_leases (worker_id, lease_id);

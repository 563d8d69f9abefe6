-- Interrupts: questions that are asked once and answered once. A status leaves 'pending' and never comes back, so each
-- write is fenced on it, and whoever finds it gone reads what became of the question.
-- columns interrupt: interrupt_id, thread_id, run_id, attempt_id, value_json, status, created_at_ms,
--  resume_payload_json, resume_payload_hash, resumed_at_ms

-- name: create
-- Ask a question, once: the same id again changes nothing and returns no row.
insert into {schema}.runtime_interrupts (interrupt_id, thread_id, run_id, attempt_id, value_json, status, created_at_ms)
values ($1, $2, $3, $4, $5, 'pending', coalesce($6, {now_ms}))
    on conflict (interrupt_id) do nothing
returning {interrupt};

-- name: find
select {interrupt}
  from {schema}.runtime_interrupts
 where interrupt_id = $1;

-- name: stored
-- What a repeated call is answered with: what it answers for may not be on any standby yet, so it waits like a write.
select {interrupt}
  from {schema}.runtime_interrupts
 where interrupt_id = $1
   {durably};

-- name: list
-- One page of all, in the order of ids, after the last id of the page before.
select {interrupt}
  from {schema}.runtime_interrupts
 where interrupt_id > $1
 order by interrupt_id
 limit $2;

-- name: list_by_thread
-- As above, of one thread; of one status ($4) if it is given.
select {interrupt}
  from {schema}.runtime_interrupts
 where thread_id = $1
   and interrupt_id > $2
   and (cast($4 as {pg_catalog}text) is null or status = $4)
 order by interrupt_id
 limit $3;

-- name: list_by_status
-- As above, of one status. It is named twice, or PostgreSQL would take it for a constant, drop it from the order, and
-- walk through the ids past all that was answered to the few that were not.
select {interrupt}
  from {schema}.runtime_interrupts
 where status in ($1, $1)
   and interrupt_id > $2
 order by status, interrupt_id
 limit $3;

-- name: resume
-- Answer the question, if nobody has.
update {schema}.runtime_interrupts
   set status              = 'resumed',
       resume_payload_json = $2,
       resume_payload_hash = $3,
       resumed_at_ms       = coalesce($4, {now_ms})
 where interrupt_id = $1
   and status       = 'pending'
returning {interrupt};

-- name: cancel
-- Withdraw the question, if nobody has answered it.
update {schema}.runtime_interrupts
   set status = 'cancelled'
 where interrupt_id = $1
   and status       = 'pending'
returning {interrupt};

-- Audit: entries that are added and read, never changed.
-- columns entry: audit_id, actor_type, actor_id, actor_role, action, resource_type, resource_id, result, request_id,
--  details_json, created_at_ms

-- name: append
insert into {schema}.runtime_audit_logs
       (actor_type, actor_id, actor_role, action, resource_type, resource_id, result, request_id, details_json,
        created_at_ms)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, coalesce($10, {now_ms}))
returning {entry};

-- name: find_moment
-- Where a page ended: its last entry's time.
select created_at_ms
  from {schema}.runtime_audit_logs
 where audit_id = $1;

-- name: list
-- One page of all, the newest first: from a moment ($1) on, before the place ($2, $3) where the page before it ended.
select {entry}
  from {schema}.runtime_audit_logs
 where created_at_ms >= $1
   and (created_at_ms, audit_id) < ($2, $3)
 order by created_at_ms desc, audit_id desc
 limit $4;

-- name: list_by_request
-- As above, of one request; of one action ($6) if it is given.
select {entry}
  from {schema}.runtime_audit_logs
 where request_id = $5
   and created_at_ms >= $1
   and (created_at_ms, audit_id) < ($2, $3)
   and (cast($6 as {pg_catalog}text) is null or action = $6)
 order by created_at_ms desc, audit_id desc
 limit $4;

-- name: list_by_action
-- As above, of one action. It is named twice, or PostgreSQL would take it for a constant, drop it from the order, and
-- walk through time past the entries of others.
select {entry}
  from {schema}.runtime_audit_logs
 where action in ($5, $5)
   and created_at_ms >= $1
   and (created_at_ms, audit_id) < ($2, $3)
 order by action, created_at_ms desc, audit_id desc
 limit $4;

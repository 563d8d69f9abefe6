-- API keys: who may use the application. Of a secret only its hash is stored, and only one statement reads it.
-- columns key: key_id, role, status, created_at_ms, updated_at_ms

-- name: put
-- Store a key, or give the one that is stored another hash; its status stays, and its role unless one is given ($2).
insert into {schema}.runtime_api_keys as stored (key_id, secret_hash, status, created_at_ms, updated_at_ms, role)
values ($1, $3, 'active', coalesce($4, {now_ms}), coalesce($4, {now_ms}), coalesce($2, 'operator'))
    on conflict (key_id) do update
   set secret_hash   = excluded.secret_hash,
       updated_at_ms = excluded.updated_at_ms,
       role          = coalesce($2, stored.role)
returning {key};

-- name: find
select {key}
  from {schema}.runtime_api_keys
 where key_id = $1;

-- name: credentials
-- A key with its hash.
select {key}, secret_hash
  from {schema}.runtime_api_keys
 where key_id = $1;

-- name: set_active
-- Give a key one status ($2) if it has the other ($3): one that has it already, or an unknown one, stays as it is.
update {schema}.runtime_api_keys
   set status        = case when status = $3 then $2 else status end,
       updated_at_ms = case when status = $3 then coalesce($4, {now_ms}) else updated_at_ms end
 where key_id = $1
returning {key};

-- name: any
select exists (select 1 from {schema}.runtime_api_keys) as found;

-- name: list
-- One page of the keys, in the order of ids, after the last id of the page before.
select {key}
  from {schema}.runtime_api_keys
 where key_id > $1
 order by key_id
 limit $2;

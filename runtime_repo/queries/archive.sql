-- What backups, restores and moves ask beside the rows themselves.

-- name: holders
-- Who holds leases just now, and how many.
select worker_id, {pg_catalog}count(*) as number
  from {schema}.runtime_leases
 where lease_expires_at_ms > {now_ms}
 group by worker_id
 order by number desc, worker_id
 limit 5;

-- name: is_newer
-- Whether a release migrated it that ships more than $1.
select {pg_catalog}max(version) > $1 as it_is
  from {schema}.runtime_schema_migrations;

-- name: objects @sqlite
-- What else there is in the file.
select name
  from main.sqlite_schema
 where type <> 'index';

-- name: indexes @sqlite
-- Those that can be made again.
select name, sql
  from main.sqlite_schema
 where type = 'index' and sql is not null
 order by name;

-- name: counter @sqlite
-- The last number that a table has given out by itself.
select seq as last
  from main.sqlite_sequence
 where name = $1;

-- name: count_on @sqlite
-- Let it go on after $2.
update main.sqlite_sequence set seq = $2
 where name = $1;
insert into main.sqlite_sequence (name, seq)
select $1, $2
 where changes() = 0;

-- name: remains @postgres
-- Schemas that keep a store of ours, and whose names begin with $1.
select n.nspname::pg_catalog.text as name
  from pg_catalog.pg_namespace as n
 where pg_catalog.starts_with(n.nspname::pg_catalog.text, $1)
   and exists (
           select 1
             from pg_catalog.pg_class as c
            where c.relnamespace = n.oid and c.relname = 'runtime_schema_migrations' and c.relkind = 'r')
 order by n.nspname;

-- name: abilities @postgres
-- What this role may do to replace a store.
select pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE') as creates_schemas,
       case when pg_catalog.to_regnamespace($1) is null then false
            else pg_catalog.has_schema_privilege(pg_catalog.to_regnamespace($1)::pg_catalog.oid, 'CREATE') end
           as creates_there;

-- name: tables @postgres
-- Our tables in the runtime schema ($1), and whose they are: those of some names ($2), and all that begin with $3.
select c.relname::pg_catalog.text as name, r.rolname::pg_catalog.text as owner
  from pg_catalog.pg_class as c
  join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
  join pg_catalog.pg_roles as r on r.oid = c.relowner
 where n.nspname = $1
   and c.relkind in ('r', 'p')
   and (c.relname = any ($2::pg_catalog.text[])
        or pg_catalog.starts_with(c.relname::pg_catalog.text, $3))
 order by c.relname;

-- name: counter @postgres
-- The last number that the column $2 of the table $1 has given out, where this role may know it.
select case when pg_catalog.has_sequence_privilege(s.name, 'SELECT, USAGE')
            then pg_catalog.pg_sequence_last_value(s.name::pg_catalog.regclass) end as last
  from (select pg_catalog.pg_get_serial_sequence($1, $2)) as s (name)
 where s.name is not null;

-- name: count_on @postgres
-- Let the column $2 of the table $1 go on after $3.
select pg_catalog.setval(pg_catalog.pg_get_serial_sequence($1, $2)::pg_catalog.regclass, $3, true) as last;

-- name: constraints @postgres
-- The keys of tables ($2) of the runtime schema ($1), each with what makes it again.
select k.conrelid::pg_catalog.regclass::pg_catalog.text as in_table, c.relname::pg_catalog.text as table_name,
       k.conname::pg_catalog.text as name, pg_catalog.pg_get_constraintdef(k.oid) as definition
  from pg_catalog.pg_constraint as k
  join pg_catalog.pg_class as c on c.oid = k.conrelid
  join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
 where n.nspname = $1
   and c.relname = any ($2::pg_catalog.text[])
   and k.contype in ('p', 'u')
 order by c.relname, k.contype, k.conname;

-- name: indexes @postgres
-- The other indexes of those.
select i.relname::pg_catalog.text as name, pg_catalog.pg_get_indexdef(x.indexrelid) as definition
  from pg_catalog.pg_index as x
  join pg_catalog.pg_class as i on i.oid = x.indexrelid
  join pg_catalog.pg_class as c on c.oid = x.indrelid
  join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
 where n.nspname = $1
   and c.relname = any ($2::pg_catalog.text[])
   and not exists (select 1 from pg_catalog.pg_constraint as k where k.conindid = x.indexrelid)
 order by c.relname, i.relname;

-- name: grants @postgres
-- What others were granted on the runtime schema ($1) and its tables ($2), and will be on what is created there.
with our as (
    select n.oid, n.nspowner, n.nspacl from pg_catalog.pg_namespace as n where n.nspname = $1
), tables as (
    select c.oid, c.relname::pg_catalog.text as name, c.relowner, c.relacl
      from our join pg_catalog.pg_class as c on c.relnamespace = our.oid
     where c.relname = any ($2::pg_catalog.text[]) and c.relkind in ('r', 'p')
), found (kind, name, part, of_role, privilege, grantee, is_grantable) as (
    select 'schema', '', '', 0::pg_catalog.oid, a.privilege_type, a.grantee, a.is_grantable
      from our cross join lateral pg_catalog.aclexplode(our.nspacl) as a
     where a.grantee <> our.nspowner
     union all
    select 'table', t.name, '', 0::pg_catalog.oid, a.privilege_type, a.grantee, a.is_grantable
      from tables as t cross join lateral pg_catalog.aclexplode(t.relacl) as a
     where a.grantee <> t.relowner
     union all
    select 'column', t.name, b.attname::pg_catalog.text, 0::pg_catalog.oid, a.privilege_type, a.grantee, a.is_grantable
      from tables as t
      join pg_catalog.pg_attribute as b on b.attrelid = t.oid and b.attnum > 0 and not b.attisdropped
     cross join lateral pg_catalog.aclexplode(b.attacl) as a
     where a.grantee <> t.relowner
     union all
    select 'default', case d.defaclobjtype when 'r' then 'tables' when 'S' then 'sequences'
                                           when 'f' then 'functions' when 'T' then 'types' else '' end,
           '', d.defaclrole, a.privilege_type, a.grantee, a.is_grantable
      from our
      join pg_catalog.pg_default_acl as d on d.defaclnamespace = our.oid
     cross join lateral pg_catalog.aclexplode(d.defaclacl) as a
)
select f.kind, f.name, f.part, coalesce(o.rolname::pg_catalog.text, '') as owner, f.privilege,
       coalesce(r.rolname::pg_catalog.text, '') as grantee, f.is_grantable
  from found as f
  left join pg_catalog.pg_roles as r on r.oid = f.grantee
  left join pg_catalog.pg_roles as o on o.oid = f.of_role
 order by f.kind desc, f.name, f.part, grantee, f.privilege;

-- name: dependents @postgres
-- What is not ours and would go on using tables ($2) of the runtime schema ($1) wherever they are moved to.
with ours as (
    select c.oid
      from pg_catalog.pg_class as c
      join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
     where n.nspname = $1 and c.relname = any ($2::pg_catalog.text[]) and c.relkind in ('r', 'p')
)
select distinct 'view ' || w.ev_class::pg_catalog.regclass::pg_catalog.text as what
  from ours
  join pg_catalog.pg_depend as d on d.refobjid = ours.oid and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass::pg_catalog.oid
   and d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass::pg_catalog.oid
  join pg_catalog.pg_rewrite as w on w.oid = d.objid
 where w.ev_class not in (select oid from ours)
 union
select 'function ' || d.objid::pg_catalog.regprocedure::pg_catalog.text
  from ours
  join pg_catalog.pg_depend as d on d.refobjid = ours.oid and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass::pg_catalog.oid
   and d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
 union
select 'foreign key ' || k.conname::pg_catalog.text || ' of ' || k.conrelid::pg_catalog.regclass::pg_catalog.text
  from ours join pg_catalog.pg_constraint as k on k.confrelid = ours.oid and k.contype = 'f'
 where k.conrelid not in (select oid from ours)
 union
select 'publication ' || p.pubname::pg_catalog.text
  from ours
  join pg_catalog.pg_publication_rel as l on l.prrelid = ours.oid
  join pg_catalog.pg_publication as p on p.oid = l.prpubid
 order by 1;

-- What boot reads and writes. IF NOT EXISTS appears nowhere: on PostgreSQL it needs CREATE even where the object exists.

-- name: create_namespace @postgres
create schema {schema};

-- name: create_ledger @postgres
-- One row for every migration that was applied, written in the migration's own transaction.
create table {schema}.runtime_schema_migrations (
    version       integer primary key,
    name          text not null,
    applied_at_ms bigint not null
);

-- name: create_ledger @sqlite
-- As above: milliseconds need BIGINT on PostgreSQL, where INTEGER has 32 bits.
create table {schema}.runtime_schema_migrations (
    version       integer primary key,
    name          text not null,
    applied_at_ms integer not null
);

-- name: record
insert into {schema}.runtime_schema_migrations (version, name, applied_at_ms)
values ($1, $2, {now_ms});

-- name: look @sqlite
-- The ledger and, beside each of its rows, the text that SQLite keeps of all that may be ours (no name of ours is before
-- $1 or after $2): one statement for a warm boot, which recognizes the text.
select version, name, applied_at_ms,
       (select group_concat(sql, char(10))
          from {schema}.sqlite_schema
         where tbl_name collate nocase between $1 and $2) as text
  from {schema}.runtime_schema_migrations;

-- name: is_table @sqlite
-- Whether the ledger's name ($1) is a table's, so that it may be read: a view runs whatever its author wrote, without end.
select exists (select 1 from {schema}.sqlite_schema
                where type = 'table' and name = $1 collate nocase and rootpage > 0) as is_table;

-- name: names @sqlite
-- Which names ($1, a JSON array) tables, views and indexes have already.
select lower(name) as name
  from {schema}.sqlite_schema
 where type <> 'trigger' and lower(name) in (select value from json_each($1));

-- name: triggers @sqlite
-- Every trigger on a table of ours.
select tbl_name as "table", name, sql
  from {schema}.sqlite_schema
 where type = 'trigger' and instr($1, '"' || lower(tbl_name) || '"');

-- name: columns @sqlite
-- Every column of ours, for a catalog whose text is not known. An index takes a table's name.
select t.type as kind, t.name as "table", t.sql, c.name, c.type, c."notnull", c.dflt_value, c.pk, c.hidden
  from {schema}.sqlite_schema as t
  left join pragma_table_xinfo(iif(t.type = 'index', null, t.name), '{schema}') as c
 where t.type in ('table', 'view', 'index')
   and instr($1, '"' || lower(t.name) || '"')
 order by t.name, c.cid;

-- name: indexes @sqlite
-- Every key column of every index of ours; the predicate is only to be read in the index's text.
select t.name as "table", i.name, i."unique", i.origin, i.partial, k.name as "column", k."desc", k.coll, s.sql
  from {schema}.sqlite_schema as t
  join pragma_index_list(t.name, '{schema}') as i
  join pragma_index_xinfo(i.name, '{schema}') as k
  left join {schema}.sqlite_schema as s on s.type = 'index' and s.name = i.name
 where t.type = 'table'
   and instr($1, '"' || lower(t.name) || '"')
   and k.key
 order by t.name, i.name, k.seqno;

-- name: is_nothing @postgres
-- Whether there still is no runtime schema, where there was none before: one row or none, unprepared. Those who wait for
-- another's migration look again and again, and this costs a small part of the look.
select where pg_catalog.to_regnamespace(e'{schema_text}') is null;

-- name: surroundings @postgres
-- What stands around: whether the schema is there ($1, its quoted name), its owner if that is a stranger, which of $2, all
-- qualified, are taken in it, the stranger who owns each of them, what row security hides from this role, the session's
-- path, whether the ledger is a table, and what would run a stranger's code in a statement that does no more than name a
-- table. Whoever owns a table or the schema may plant triggers and the like at any time: a stranger is who is neither this
-- role, nor one that it belongs to (of a superuser pg_has_role would say that of every role), nor the database's owner or a
-- superuser, of whom pg_has_role says that it is that owner too. To ask by name needs no plan, which halves the cost on a
-- fresh connection.
  with recursive groups (id) as (
       select m.roleid
         from pg_catalog.pg_auth_members as m
         join pg_catalog.pg_roles as r on r.oid operator(pg_catalog.=) m.member
        where r.rolname operator(pg_catalog.=) current_user
        union
       select m.roleid
         from pg_catalog.pg_auth_members as m
         join groups as g on g.id operator(pg_catalog.=) m.member),
       strangers as (
       select r.oid as id, r.rolname::pg_catalog.text as name
         from pg_catalog.pg_roles as r
        where r.rolname operator(pg_catalog.<>) current_user
          and not pg_catalog.pg_has_role(r.oid, 'pg_database_owner'::pg_catalog.name, 'member'::pg_catalog.text)
          and not r.oid operator(pg_catalog.=) any (array(select id from groups))),
       theirs as (
       select c.oid as id, x as full_name, s.name as owner,
              x operator(pg_catalog.=) e'{schema_text}.runtime_schema_migrations'::pg_catalog.text as is_ledger
         from pg_catalog.unnest($2::pg_catalog.text[]) as x
         join pg_catalog.pg_class as c on c.oid operator(pg_catalog.=) pg_catalog.to_regclass(x)::pg_catalog.oid
         join strangers as s on s.id operator(pg_catalog.=) c.relowner
        where c.relkind operator(pg_catalog.=) 'r'::pg_catalog."char")
select pg_catalog.to_regnamespace($1::pg_catalog.text) is not null as namespace,
       array(select x from pg_catalog.unnest($2::pg_catalog.text[]) as x
              where pg_catalog.to_regclass(x) is not null or pg_catalog.to_regtype(x) is not null) as taken,
       array(select x from pg_catalog.unnest($2::pg_catalog.text[]) as x
              where pg_catalog.row_security_active(pg_catalog.to_regclass(x)::pg_catalog.oid)) as hidden,
       pg_catalog.current_setting('search_path') as path,
       current_user::pg_catalog.text as role,
       exists (select from pg_catalog.pg_class
                where oid operator(pg_catalog.=)
                      pg_catalog.to_regclass(e'{schema_text}.runtime_schema_migrations')::pg_catalog.oid
                  and relkind operator(pg_catalog.=) 'r'::pg_catalog."char") as readable,
       (select s.name
          from pg_catalog.pg_namespace as n
          join strangers as s on s.id operator(pg_catalog.=) n.nspowner
         where n.oid operator(pg_catalog.=) pg_catalog.to_regnamespace($1::pg_catalog.text)::pg_catalog.oid) as stranger,
       array(select full_name from theirs) as theirs,
       array(select owner from theirs) as owners,
       array(select pg_catalog.concat('index ', pg_catalog.quote_ident(c.relname::pg_catalog.text), ' on ', t.full_name)
               from theirs as t
               join pg_catalog.pg_index as i on i.indrelid operator(pg_catalog.=) t.id
               join pg_catalog.pg_class as c on c.oid operator(pg_catalog.=) i.indexrelid
              where t.is_ledger and (i.indexprs is not null or i.indpred is not null)
              union all
             select pg_catalog.concat('statistics ', pg_catalog.quote_ident(e.stxname::pg_catalog.text), ' on ',
                                      t.full_name)
               from theirs as t
               join pg_catalog.pg_statistic_ext as e on e.stxrelid operator(pg_catalog.=) t.id
              where e.stxexprs is not null) as traps;

-- name: look @postgres
-- The raw catalog text of our relations ($1, qualified names), by which a warm boot recognizes it, in one statement that
-- reads the catalogs only: to name a table may run what its owner has planted, in a view or in the expressions of an index
-- or of statistics. So who owns the schema and the tables, and what the session's path names before pg_catalog, is a part
-- of the text; the path is read as it is written, for a schema that it names may be created later. What is seldom is only
-- in the text where it is. Its cost is planning and page faults on a fresh
-- connection, so it has no joins and makes no records, every operator and type is the one that an index of the catalogs has
-- (an oid compared to a regclass costs 0.2 ms), and an index is not named (0.3 ms): an equal one under another name serves.
-- pg_get_expr locks the table that it is about, so while somebody changes that table the statement gives up soon.
select pg_catalog.current_setting('search_path') operator(pg_catalog.~~*) '%_pg_catalog%'::pg_catalog.text as path,
       (select case when pg_catalog.pg_has_role(nspowner, 'pg_database_owner'::pg_catalog.name,
                                                'member'::pg_catalog.text)
                      or pg_catalog.current_setting('is_superuser') operator(pg_catalog.=) 'off'::pg_catalog.text
                     and pg_catalog.pg_has_role(nspowner, 'member'::pg_catalog.text)
                    then '' else ' stranger' end
          from pg_catalog.pg_namespace
         where oid operator(pg_catalog.=) pg_catalog.to_regnamespace(e'{schema_text}')::pg_catalog.oid) as namespace,
       pg_catalog.array_to_string(array(
           select pg_catalog.concat_ws(' ', pg_catalog.array_position(o, oid), relkind, relpersistence, relhasrules,
                                       relhastriggers, relrowsecurity, relchecks, relhassubclass,
                                       case when relforcerowsecurity then 'forced' end,
                                       case when relispartition then 'partition' end,
                                       case when pg_catalog.pg_has_role(
                                                     relowner, 'pg_database_owner'::pg_catalog.name,
                                                     'member'::pg_catalog.text)
                                              or pg_catalog.current_setting('is_superuser')
                                                     operator(pg_catalog.=) 'off'::pg_catalog.text
                                             and pg_catalog.pg_has_role(relowner, 'member'::pg_catalog.text)
                                            then null else 'stranger' end)
             from pg_catalog.pg_class
            where oid operator(pg_catalog.=) any (o)), e'\n') as relations,
       pg_catalog.array_to_string(array(
           select pg_catalog.concat_ws(' ', pg_catalog.array_position(o, attrelid), attnum, attname, atttypid, atttypmod,
                                       attnotnull, attidentity, attgenerated, attcollation,
                                       case when attinhcount operator(pg_catalog.>) 0 then 'inherited' end)
             from pg_catalog.pg_attribute
            where attrelid operator(pg_catalog.=) any (o) and attnum operator(pg_catalog.>) 0), e'\n') as columns,
       pg_catalog.array_to_string(array(
           select pg_catalog.concat_ws(' ', pg_catalog.array_position(o, adrelid), adnum,
                                       pg_catalog.pg_get_expr(adbin, adrelid))
             from pg_catalog.pg_attrdef
            where adrelid operator(pg_catalog.=) any (o)), e'\n') as defaults,
       pg_catalog.array_to_string(array(
           select pg_catalog.concat_ws(' ', pg_catalog.array_position(o, indrelid), indisunique, indisprimary,
                                       indisvalid, indisready, indislive, indimmediate, indnkeyatts, indkey, indoption,
                                       indclass, indcollation, pg_catalog.pg_get_expr(indexprs, indrelid),
                                       pg_catalog.pg_get_expr(indpred, indrelid))
             from pg_catalog.pg_index
            where indrelid operator(pg_catalog.=) any (o)), e'\n') as indexes
  from (select array(select pg_catalog.to_regclass(x)::pg_catalog.oid
                       from pg_catalog.unnest($1::pg_catalog.text[]) as x) as o,
               pg_catalog.set_config('lock_timeout', '100ms', true),
               pg_catalog.set_config('quote_all_identifiers', 'off', true) offset 0) as bounded

-- name: catalog @postgres
-- Every relation of the schema $1 that bears one of our names ($2), column by column and index by index, for a catalog
-- whose text is not known. A table takes a type's name too, so types count. A number that a column's own sequence
-- provides is as good as an identity. One row without a name is a schema that holds nothing of ours; no row is none.
select c.relname, c.relkind,
       (select pg_catalog.json_agg(pg_catalog.json_build_array(
                   a.attnum, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull,
                   a.attgenerated <> '',
                   a.attidentity <> ''
                   or pg_catalog.pg_get_expr(d.adbin, d.adrelid)
                      = pg_catalog.format('nextval(%L::regclass)', pg_catalog.pg_get_serial_sequence(
                            pg_catalog.quote_ident(n.nspname::pg_catalog.text) || '.'
                            || pg_catalog.quote_ident(c.relname::pg_catalog.text),
                            a.attname::pg_catalog.text)::pg_catalog.regclass),
                   pg_catalog.pg_get_expr(d.adbin, d.adrelid),
                   exists (with recursive domains (id, base, is_required) as (
                               select t.oid, t.typbasetype, t.typnotnull from pg_catalog.pg_type as t
                                where t.oid = a.atttypid and t.typtype = 'd'
                                union all
                               select t.oid, t.typbasetype, t.typnotnull from pg_catalog.pg_type as t
                                 join domains as e on t.oid = e.base and t.typtype = 'd')
                           select from domains as e
                            where e.is_required
                               or exists (select from pg_catalog.pg_constraint as k where k.contypid = e.id)),
                   (select l.collname from pg_catalog.pg_collation as l
                     where l.oid = a.attcollation and not l.collisdeterministic)) order by a.attnum)
          from pg_catalog.pg_attribute as a
          left join pg_catalog.pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
         where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)::pg_catalog.text as columns,
       (select pg_catalog.json_agg(pg_catalog.json_build_array(
                   x.relname, i.indisprimary, i.indisunique, i.indimmediate,
                   i.indisvalid and i.indisready and i.indislive, i.indkey::pg_catalog.int2[],
                   pg_catalog.pg_get_indexdef(i.indexrelid)))
          from pg_catalog.pg_index as i
          join pg_catalog.pg_class as x on x.oid = i.indexrelid
         where i.indrelid = c.oid)::pg_catalog.text as indexes
  from pg_catalog.pg_namespace as n
  left join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relname = any ($2::pg_catalog.text[])
 where n.nspname = $1
 union all
select t.typname, 't', null, null
  from pg_catalog.pg_namespace as n
  join pg_catalog.pg_type as t
    on t.typnamespace = n.oid and t.typrelid = 0::pg_catalog.oid and t.typname = any ($2::pg_catalog.text[])
 where n.nspname = $1;

-- name: attached @postgres
-- What hangs on the tables of the schema $1 that bear one of our names ($2): the kind and name, and its text. An
-- internal trigger belongs to a foreign key, and a NOT NULL is told with its column.
  with ours as (
       select c.oid, c.relname, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity
         from pg_catalog.pg_namespace as n
         join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relname = any ($2::pg_catalog.text[])
        where n.nspname = $1
          and c.relkind = 'r')
select o.relname, 'trigger ' || t.tgname::pg_catalog.text as what, pg_catalog.pg_get_triggerdef(t.oid) as line
  from ours as o join pg_catalog.pg_trigger as t on t.tgrelid = o.oid and not t.tgisinternal
 union all
select o.relname, 'rule ' || r.rulename::pg_catalog.text,
       pg_catalog.regexp_replace(pg_catalog.pg_get_ruledef(r.oid), e'\\s+', ' ', 'g')
  from ours as o join pg_catalog.pg_rewrite as r on r.ev_class = o.oid
 union all
select o.relname, 'unlogged storage', 'a crash empties the table' from ours as o where o.relpersistence = 'u'
 union all
select o.relname, 'child table ' || i.inhrelid::pg_catalog.regclass::pg_catalog.text, 'it inherits the table'
  from ours as o join pg_catalog.pg_inherits as i on i.inhparent = o.oid
 union all
select o.relname, 'parent table ' || i.inhparent::pg_catalog.regclass::pg_catalog.text, 'the table belongs to it'
  from ours as o join pg_catalog.pg_inherits as i on i.inhrelid = o.oid
 union all
select o.relname,
       case k.contype when 'c' then 'check constraint ' when 'f' then 'foreign key ' else 'exclusion constraint ' end
       || k.conname::pg_catalog.text,
       pg_catalog.pg_get_constraintdef(k.oid)
  from ours as o join pg_catalog.pg_constraint as k on k.conrelid = o.oid and k.contype in ('c', 'f', 'x')
 union all
select o.relname, 'foreign key ' || k.conname::pg_catalog.text || ' of ' || k.conrelid::pg_catalog.regclass::pg_catalog.text,
       pg_catalog.pg_get_constraintdef(k.oid)
  from ours as o join pg_catalog.pg_constraint as k on k.confrelid = o.oid and k.conrelid <> o.oid
 union all
select o.relname, 'collation of ' || a.attname::pg_catalog.text, l.collname::pg_catalog.text
  from ours as o
  join pg_catalog.pg_attribute as a on a.attrelid = o.oid and a.attnum > 0
  join pg_catalog.pg_collation as l on l.oid = a.attcollation and l.collname <> 'default' and l.collisdeterministic
 union all
select o.relname, 'row security', 'it does not apply to this role'
  from ours as o where o.relrowsecurity
 union all
select o.relname, 'forced row security', 'it is not enabled'
  from ours as o where o.relforcerowsecurity and not o.relrowsecurity
 order by 1, 2;

-- name: lock_holder @postgres
-- Who is in the way: a migration that has been running for a while, otherwise the oldest transaction that holds a lock
-- on one of our tables, or on the migration lock. An advisory key is the same in every database. Of another user's session
-- a role without pg_read_all_stats sees neither address nor times; a Unix socket has the port -1.
select a.pid, coalesce(a.application_name, '') as application_name, a.usename::pg_catalog.text as user_name,
       case when a.client_port = -1 then 'local' else pg_catalog.host(a.client_addr) end as client_address,
       extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::double precision as transaction_age,
       extract(epoch from pg_catalog.clock_timestamp() - a.backend_start)::double precision as session_age
  from pg_catalog.pg_locks as l
  join pg_catalog.pg_stat_activity as a on a.pid = l.pid
 where l.granted
   and l.pid <> pg_catalog.pg_backend_pid()
   and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
   and (   (l.locktype = 'advisory' and l.classid::bigint = $1::bigint and l.objsubid = 2
            and l.objid::bigint = $2::bigint & 4294967295::bigint)
        or (l.locktype = 'relation' and l.relation in (
               select c.oid from pg_catalog.pg_class as c
                where c.relnamespace = (select oid from pg_catalog.pg_namespace where nspname = $3))))
 order by l.locktype = 'advisory' and a.xact_start < pg_catalog.clock_timestamp() - interval '1 second' desc,
          a.xact_start
 limit 1;

-- name: tell @postgres
-- Tell of queues ($2, a JSON array) on a channel ($1), at the commit of this transaction.
select pg_catalog.pg_notify($1, named.queue) as told
  from pg_catalog.json_array_elements_text($2::pg_catalog.text::pg_catalog.json) as named (queue);

-- name: tell_now @postgres
-- As above, in a transaction of its own, whose commit need not outlive a crash.
select pg_catalog.pg_notify($1, named.queue) as told,
       pg_catalog.set_config('synchronous_commit', 'off', true) as forgetful
  from pg_catalog.json_array_elements_text($2::pg_catalog.text::pg_catalog.json) as named (queue);

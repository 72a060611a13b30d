-- Before every script. Keys are one conversation's (`redis_values.py` says what they hold); LOG is
-- the beginning of its logs' keys. A script answers with one packed row whose first value says how
-- it went. All reads of keys come before the first write: a key of a wrong type changes nothing.

local META, PARENTS, TURNS, IDS, ASKS, REPLIES, RUNNING, ENDED, REFUSED, NAMES, FORGOTTEN, LOG,
  LEASE, DELETIONS = unpack(KEYS)
local META_FIELDS = {
  'owner', 'title', 'created', 'updated', 'system', 'settings', 'revision', 'leaf'
}
local CHUNK = 1000  -- values in one command: Lua's stack holds some thousands

local function pack(row)
  local parts = {}
  for i = 1, row.n do
    local value = row[i]
    parts[i] = value and (#value .. ':' .. value) or '-:'
  end
  return table.concat(parts)
end

local function add(row, value)
  row.n = row.n + 1
  row[row.n] = value or false
end

local function answer(...)
  local row = {n = 0}
  for i = 1, select('#', ...) do add(row, (select(i, ...))) end
  return row
end

local function add_meta(row)
  local values = redis.call('HMGET', META, unpack(META_FIELDS))
  for i = 1, #META_FIELDS do add(row, values[i]) end
end

-- Whether the conversation is there, and the owner's.
local function owned(owner)
  return redis.call('HGET', META, 'owner') == owner
end

-- Whether another server than this one has the conversations: it begins replies, and takes them up.
local function elsewhere(id)
  local lease = redis.call('GET', LEASE)
  return lease and string.match(lease, '^%S*') ~= id
end

local function add_turns(row, turns, parents)
  for first = 1, #turns, CHUNK do
    local ids = {unpack(turns, first, math.min(first + CHUNK - 1, #turns))}
    local values = redis.call('HMGET', TURNS, unpack(ids))
    local tokens = redis.call('HMGET', IDS, unpack(ids))
    for i = 1, #ids do
      add(row, ids[i])
      add(row, parents[first + i - 1])
      add(row, values[i])
      add(row, tokens[i])
    end
  end
end

-- The path from a turn up to a first message, in this order: turns and their values of PARENTS.
local function path(turn)
  local turns, parents = {}, {}
  while turn ~= '' do
    local value = redis.call('HGET', PARENTS, turn)
    turns[#turns + 1] = turn
    parents[#parents + 1] = value
    turn = value and string.match(value, '^%a%d+ (.*)$') or ''
  end
  return turns, parents
end

local function add_record(row, reply)
  add(row, redis.call('HGET', REPLIES, reply))
  add(row, redis.call('HGET', RUNNING, reply))
  add(row, redis.call('HGET', ENDED, reply))
  add(row, redis.call('HGET', TURNS, reply))
end

-- The turn that a running reply answers, from its value of RUNNING.
local function answered(value)
  return string.match(value, '^%d+ %d+ %S+ (.*)$')
end

-- One more revision; returns it.
local function change(now)
  local updated = redis.call('HGET', META, 'updated')
  if tonumber(updated) < tonumber(now) then redis.call('HSET', META, 'updated', now) end
  return redis.call('HINCRBY', META, 'revision', 1)
end

local function keep_turn(turn, role, parent, value, ids)
  redis.call('HSET', PARENTS, turn, role .. redis.call('HLEN', PARENTS) .. ' ' .. parent)
  redis.call('HSET', TURNS, turn, value)
  if ids ~= '' then redis.call('HSET', IDS, turn, ids) end
  redis.call('HINCRBY', META, 'bytes', #value)
end

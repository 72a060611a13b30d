-- reply. Answers: ok, meta, record, path | gone | ended
local reply = ARGV[1]
local running = redis.call('HGET', RUNNING, reply)
if not running then
  return pack(answer(redis.call('HEXISTS', ENDED, reply) == 1 and 'ended' or 'gone'))
end
local epoch, revision, logged, turn = string.match(running, '^(%d+) (%d+) (%S+) (.*)$')
local last = redis.call('XREVRANGE', LOG .. reply, '+', '-', 'COUNT', 1)
local at, seq = '0', '0'
if last[1] then at, seq = string.match(last[1][1], '^(%d+)-(%d+)$') end
if at == '0' then seq = '0' end  -- the log's head
local turns, parents = path(turn)
if not parents[#parents] or redis.call('EXISTS', META) == 0 then return pack(answer('gone')) end

local ends = logged == '-' and seq or (logged .. ',' .. seq)
redis.call('HSET', RUNNING, reply, (epoch + 1) .. ' ' .. revision .. ' ' .. ends .. ' ' .. turn)
-- A log that was lost is begun again.
if not last[1] then redis.call('XADD', LOG .. reply, '0-1', 't', '') end
local row = answer('ok')
add_meta(row)
add_record(row, reply)
add_turns(row, turns, parents)
return pack(row)

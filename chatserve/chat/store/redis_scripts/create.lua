-- owner, number of meta arguments, meta fields and values, then turns: id, role, parent, value, ids
local owner = redis.call('HGET', META, 'owner')
if owner then return pack(answer(owner == ARGV[1] and 'ok' or 'taken')) end
redis.call('HLEN', PARENTS); redis.call('HLEN', TURNS); redis.call('HLEN', IDS)
local fields = tonumber(ARGV[2])
redis.call('HSET', META, unpack(ARGV, 3, 2 + fields))
for i = 3 + fields, #ARGV, 5 do
  keep_turn(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4])
end
return pack(answer('ok'))

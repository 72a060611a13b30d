-- owner. Answers: ok, meta, number of records, records (id and values), turns
if not owned(ARGV[1]) then return pack(answer('gone')) end
local row = answer('ok')
add_meta(row)
local replies = {}
for _, reply in ipairs(redis.call('HKEYS', REPLIES)) do
  if redis.call('HEXISTS', TURNS, reply) == 0 then replies[#replies + 1] = reply end
end
add(row, tostring(#replies))
for _, reply in ipairs(replies) do
  add(row, reply)
  add_record(row, reply)
end
local flat, turns, parents = redis.call('HGETALL', PARENTS), {}, {}
for i = 1, #flat, 2 do
  turns[#turns + 1], parents[#parents + 1] = flat[i], flat[i + 1]
end
add_turns(row, turns, parents)
return pack(row)

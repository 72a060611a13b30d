-- owner. Answers: ok, the replies that were running
if not owned(ARGV[1]) then return pack(answer('gone')) end
local row = answer('ok')
-- What is damaged can be deleted too.
for _, reply in ipairs(redis.pcall('HKEYS', RUNNING)) do add(row, reply) end
for i = 2, row.n do redis.call('UNLINK', LOG .. row[i]) end
redis.call('UNLINK', META, PARENTS, TURNS, IDS, ASKS, REPLIES, RUNNING, ENDED, REFUSED)
return pack(row)

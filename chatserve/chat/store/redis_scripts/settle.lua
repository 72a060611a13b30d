-- owner, reply. Answers: known | refused | gone
local owner, reply = unpack(ARGV)
if not owned(owner) then return pack(answer('gone')) end
if redis.call('HEXISTS', REPLIES, reply) == 1 then return pack(answer('known')) end
-- An acceptance that is still on its way finds this.
redis.call('SADD', REFUSED, reply)
return pack(answer('refused'))

"""Learning from live traffic: no tasks, no groups, no ids.

``run``     the experiment: proxy, agent, users, ``lightning-proxy train`` on a schedule (read this first)
``users``   who ask the agent, and put thumbs up or down, late, now and then, sometimes the wrong one at first
``report``  success by policy version, with 95% intervals, and the picture
"""

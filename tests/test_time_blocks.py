import csv,json,time,sys
from pathlib import Path
def test_t(tiny_workspace,cli):
    with open("my-examples.csv","w",newline="") as f:
        w=csv.writer(f); w.writerow(["context","question","answer"])
        for i in range(60): w.writerow([f"Text {i}: mto {i%7}.",f"Swali {i}?",f"mto {i%7}"])
    Path("english.jsonl").write_text("".join(json.dumps({"context":f"Text {i}e: river {i%7}.","question":f"Question {i}?","answer":f"river {i%7}"})+"\n" for i in range(80)))
    for args in (["init","my-examples.csv","--language","sw","--source","english.jsonl","--backbone","tiny-llama"],["check","my-examples.yaml"],["run","my-examples.yaml"],["predict","runs/my-examples/adapter","..."],["compare","my-examples.yaml","--methods","merged,continued,grasp","--seeds","42"]):
        t=time.time(); r=cli(*args); print(args[0],r.status,time.time()-t,r.out[-300:] if args[0]!="compare" else "",r.err[:600],file=sys.__stderr__)

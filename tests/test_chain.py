from cbd_hub import CBDModel, Chain
def test_smoke(chain):
    c=Chain.from_pretrained(chain)
    print(c, c.manifest.links)
    for s in range(c.anchors[-1].parameters, c.anchors[0].parameters, 3000):
        try: m=CBDModel.from_chain(chain, s, tolerance=.2)
        except Exception as e: print(s, repr(e)); raise
        print(m.config.cbd, sum(p.numel() for p in m.parameters()))
